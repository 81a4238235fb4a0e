"""The error a user sees as one line; everything else is a bug and keeps its traceback."""


class UserError(Exception):
    """Something in the user's files or flags that the user can mend. The text names it, says what is wrong and what to do.

    `exit_status` is what the command line returns: 1 when the work found a problem, 2 when it was asked for wrongly.
    """

    def __init__(self, message: str, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status
