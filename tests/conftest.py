"""What all tests share.

Property tests on a shared machine: an example may be slow for reasons of its own, so there is no deadline. A shell
starts background jobs with Ctrl-C switched off, which their children inherit; the tests of interrupts need it on.
"""

from __future__ import annotations

import signal

from hypothesis import settings

settings.register_profile("shared", settings(), deadline=None)
settings.load_profile("shared")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
