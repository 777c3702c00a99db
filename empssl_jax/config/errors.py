"""Errors that a user can fix. Each is one sentence: the option, its value, and the remedy."""


class UserError(ValueError):
    """Something the user can fix. The message is one sentence that says what is wrong and how to fix it."""

    exit_code = 2


class InUseError(UserError):
    """Another process is using the folder."""


class StorageError(UserError):
    """A file could not be written. Everything saved before is intact."""

    exit_code = 1


class DivergenceError(UserError):
    """A loss, an update, a parameter or an embedding is NaN or infinite."""

    exit_code = 1


def require(condition: bool, option: str, value: object, remedy: str) -> None:
    """Raises UserError naming the option, its value and the remedy unless the condition holds."""
    if not condition:
        raise UserError(f"{flag(option)} is {one_line(value)}: {remedy}.")


def install(extra: str) -> str:
    """The command that installs an extra of this package from a checkout; no package index has the package."""
    return f'pip install -e ".[{extra}]"'


def flag(option: str) -> str:
    """The option as written on the command line."""
    return "--" + option.replace("_", "-")


def counted(number: int, noun: str) -> str:
    """A number with its noun, such as "1 image" and "2 images"."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}{'es' if noun.endswith(('s', 'ch')) else 's'}"


def words(value: object) -> list[str]:
    """The value of an option as on the command line: one word, or one for each number."""
    return [str(part) for part in value] if isinstance(value, tuple) else [str(value)]


def one_line(value: object) -> str:
    """The value as messages show it: on one line, at most 200 characters. For an exception, its message."""
    try:
        text = " ".join((str(value) if isinstance(value, BaseException) else repr(value)).split())
    except Exception:  # Python prints no integer of more than 4300 digits, and a value's own repr may fail
        text = f"some {type(value).__name__}"
    return text if len(text) <= 200 else text[:197] + "..."
