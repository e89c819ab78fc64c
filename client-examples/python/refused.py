"""What a daemon answers instead of what was asked for."""


class Refused(Exception):
    """A problem (RFC 9457): programs go by its code."""

    def __init__(self, status, code, detail):
        super().__init__(f"{status} {code}: {detail}")
        self.status, self.code = status, code
