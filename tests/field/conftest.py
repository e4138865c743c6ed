"""The tiny world of the integration tests, for tests that need a run."""

from tests.integration.conftest import _process_settings, trained, world

__all__ = ["_process_settings", "trained", "world"]
