"""The error a user can act on."""


class UserError(Exception):
    """Something the user gave is wrong: the message says what, where, and what to do. Shown without a traceback."""
