"""Multimodal sequential and session-based recommendation for RecBole.

Importing this package is enough to cure RecBole 1.2.1 on today's packages and to let it find our models; neither
RecBole nor torch is imported before it is needed.
"""

from recbole_mm import compat
from recbole_mm.version import __version__

compat.apply()

from recbole_mm import registration  # noqa: E402  (it hooks into what compat has just set up)

registration.apply()

__all__ = ["__version__"]
