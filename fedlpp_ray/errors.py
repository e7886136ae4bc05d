"""The errors that a user can mend."""


class UserError(ValueError):
    """The input cannot be used. The message says what is wrong and what is allowed.

    The command lines print it as one line, without a traceback.
    """
