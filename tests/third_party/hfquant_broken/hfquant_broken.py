"""A backend whose library is not there, as after an incomplete installation."""

from a_library_that_is_not_installed import backend

__all__ = ["backend"]
