"""Numbers in sentences and tables: ``1 task``, ``2 tasks``, and never ``-0.0``."""


def counted(number: int, noun: str) -> str:
    """Return the number with its noun, in the plural where it is not one."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def fixed(value: float, digits: int) -> str:
    """Return ``value`` with so many digits after the point; what rounds to zero has no sign."""
    return f"{round(value, digits) + 0.0:.{digits}f}"
