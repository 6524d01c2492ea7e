"""Everything that can go wrong, as one tree.

::

    MasqError                exit 1   what, why and what to do, in words
    ├── UsageError           exit 2   the command line cannot be carried out as written
    ├── ConfigError          exit 2   a setting is wrong: file, line, value, what is allowed
    ├── HostError            exit 1   this machine lacks something: root, kernel, bcc, …
    ├── InterfaceError       exit 1   an interface is missing, taken, or has no address
    ├── ForwardError         exit 1   a forward cannot stand beside what is there, or is not there
    ├── BusyError            exit 1   another command is at work
    ├── DatapathError        exit 1   compiling, loading or attaching programs failed
    └── NotAttachedError     exit 1   there is no running datapath to talk to

Each carries three sentences' worth of text: *what* happened, *why*, and *what to do*.
"""


class MasqError(Exception):
    """An error a person can act on.

    Args:
        what: what happened, without a full stop.
        why: the cause; may be empty.
        do: what the user can do about it; may be empty.
    """

    exit_code = 1

    def __init__(self, what: str, why: str = "", do: str = "") -> None:
        self.what, self.why, self.do = what, why, do
        super().__init__(": ".join(part for part in (what, why) if part) + (f"; {do}" if do else ""))

    def as_dict(self) -> dict[str, str]:
        """The error for a machine reader (and for passing it from the agent to its starter)."""
        return {"kind": type(self).__name__, "what": self.what, "why": self.why, "do": self.do}


class UsageError(MasqError):
    exit_code = 2


class ConfigError(MasqError):
    exit_code = 2


class HostError(MasqError):
    pass


class InterfaceError(MasqError):
    pass


class ForwardError(MasqError):
    pass


class BusyError(MasqError):
    pass


class DatapathError(MasqError):
    pass


class NotAttachedError(MasqError):
    pass


def from_dict(fields: dict[str, str]) -> MasqError:
    """The inverse of :meth:`MasqError.as_dict`; an unknown kind becomes a plain MasqError."""
    kinds = {kind.__name__: kind for kind in MasqError.__subclasses__()}
    kind = kinds.get(fields["kind"], MasqError)
    return kind(fields["what"], fields["why"], fields["do"])
