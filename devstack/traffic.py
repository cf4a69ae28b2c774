"""Traffic for the demo: what an application does to the source tables, rolled-back transactions included.

A trigger stores the current content in each event's `raw_payload`. From that `comparison` computes what the sinks must
have, however often the content has changed since.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from itertools import accumulate

import psycopg

TICK_SECONDS = 0.05
TRICKLE_EVENTS = (2, 12)  # per transaction; one to three of them a tick make some 250 events a second
BULK_EVENTS = 1_500  # an import job's transaction
CONTENTS = 200

EVENT_TYPES = ("play", "pause", "seek", "finish", "like", "share", "click")
DEVICES = ("web", "ios", "android", "tv", None)
CONTENT_TYPES = ("video", "article", "podcast", "clip")

ADD_CONTENTS = """
INSERT INTO public.content (content_id, content_type, length_seconds)
SELECT id, (%s::text[])[1 + id %% 4], nullif(id * 37 %% 900, 0)::int FROM generate_series(1, %s) AS id
ON CONFLICT (content_id) DO NOTHING
"""

NOTE_CONTENT = """
CREATE FUNCTION note_content() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.raw_payload := (SELECT to_jsonb(content) FROM public.content WHERE content_id = NEW.content_id);
    RETURN NEW;
END $$;
CREATE TRIGGER note_content BEFORE INSERT ON public.engagement_events FOR EACH ROW EXECUTE FUNCTION note_content();
"""

CHANGE_CONTENT = "UPDATE public.content SET content_type = %s, length_seconds = %s WHERE content_id = %s"

ADD_EVENTS = """
INSERT INTO public.engagement_events (content_id, user_id, event_type, event_ts, duration_ms, device)
SELECT content_id, user_id, event_type, clock_timestamp(), duration_ms, device
FROM unnest(%s::bigint[], %s::bigint[], %s::text[], %s::int[], %s::text[])
     AS event (content_id, user_id, event_type, duration_ms, device)
"""


class Traffic:
    """One session that inserts until `stop`. Call `run` in a thread."""

    def __init__(self, dsn: str, seed: int) -> None:
        self._dsn = dsn
        self._random = random.Random(seed)  # noqa: S311  not a secret
        self._stopping = threading.Event()
        # The n-th content has popularity 1/n (Zipf), as in real catalogs.
        self._popularity = list(accumulate(1 / n for n in range(1, CONTENTS + 1)))

    def stop(self) -> None:
        """Let `run` return after the current transaction."""
        self._stopping.set()

    def run(self) -> None:
        """Insert until stopped. Raises psycopg.Error."""
        habits = {
            self._browse: 90,
            self._change_content: 4,
            self._change_mind: 3,
            self._skip_a_step: 2,
            self._import: 1,
        }
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            connection.execute(NOTE_CONTENT)
            connection.execute(ADD_CONTENTS, [list(CONTENT_TYPES), CONTENTS])
            while not self._stopping.wait(TICK_SECONDS):
                [habit] = self._random.choices(list(habits), list(habits.values()))
                habit(connection)

    def _browse(self, connection: psycopg.Connection) -> None:
        """People look at things: one to three small transactions."""
        for _ in range(self._random.randint(1, 3)):
            with connection.transaction():
                self._add_events(connection, self._random.randint(*TRICKLE_EVENTS))

    def _change_content(self, connection: psycopg.Connection) -> None:
        """An editor changes popular content; the same transaction inserts an event of it."""
        length = self._random.choice([None, self._random.randint(1, 900)])
        with connection.transaction():
            changed = [self._random.choice(CONTENT_TYPES), length, self._contents(1)[0]]
            connection.execute(CHANGE_CONTENT, changed)
            self._add_events(connection, 2)

    def _change_mind(self, connection: psycopg.Connection) -> None:
        """Events and a content change that are rolled back."""
        with connection.transaction(force_rollback=True):
            self._add_events(connection, 20)
            connection.execute(CHANGE_CONTENT, ["never", 1, self._contents(1)[0]])

    def _skip_a_step(self, connection: psycopg.Connection) -> None:
        """A savepoint is rolled back, the rest is committed."""
        with connection.transaction():
            self._add_events(connection, 3)
            with connection.transaction(force_rollback=True):
                self._add_events(connection, 5)
            self._add_events(connection, 3)

    def _import(self, connection: psycopg.Connection) -> None:
        """A bulk job."""
        with connection.transaction():
            self._add_events(connection, BULK_EVENTS)

    def _contents(self, count: int) -> list[int]:
        return self._random.choices(range(1, CONTENTS + 1), cum_weights=self._popularity, k=count)

    def _add_events(self, connection: psycopg.Connection, count: int) -> None:
        choose = self._random.choice
        durations = [choose([None, self._random.randint(0, 900_000)]) for _ in range(count)]
        columns: list[Sequence[object]] = [
            self._contents(count),
            [self._random.randint(1, 5_000) for _ in range(count)],
            [choose(EVENT_TYPES) for _ in range(count)],
            durations,
            [choose(DEVICES) for _ in range(count)],
        ]
        connection.execute(ADD_EVENTS, columns)
