"""`notify test`: is somebody told when something goes wrong?"""

from __future__ import annotations

import time

import msgspec

from replicator.contracts.errors import SettingsError


async def test() -> int:
    """Send a message to REPLICATOR_NOTIFY_URL.

    It asks nobody else, and the replicator need not run.
    """
    from replicator.contracts.settings import CoreSettings, load
    from replicator.operations.notices.post import ask
    from replicator.operations.notices.ring import Notice
    from replicator.operations.notices.rule import message

    settings = load(CoreSettings)
    if not settings.notify_url:
        expected = CoreSettings.model_fields["notify_url"].description or ""
        raise SettingsError(name="REPLICATOR_NOTIFY_URL", problem="it is not set", expected=expected)
    notice = Notice(kind="test", subject=settings.slot, text="a test: nothing is wrong", cure="", began_at=time.time())
    body = msgspec.json.encode(message(settings.slot, notice, "test"))
    print(f"sent: {await ask('notify_url', settings.notify_url, body)}")
    return 0
