"""The one exception that is the user's to mend."""


class UserError(Exception):
    """A mistake of the user's, or of his surroundings; its message ends the search.

    It is shown as one line without a traceback. Everything else keeps its traceback.
    """
