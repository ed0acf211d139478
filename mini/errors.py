class UserError(Exception):
    """A user's mistake or a broken input: shown as one line, exit status 2, no traceback."""
