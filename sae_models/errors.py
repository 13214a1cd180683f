"""The base class of errors that the user can correct."""


class UserError(ValueError):
    """A file, a configuration or an argument that cannot be used as it is.

    The message is one line that names what is wrong. Commands print it and exit with status 2; a bare ValueError is a
    bug and keeps its traceback.
    """
