"""Follow events by eye: one through every sink (`trace.py`), those that go through now, those that come next."""
