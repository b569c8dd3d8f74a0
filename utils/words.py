"""Numbers in sentences and tables: ``1 task``, ``2 tasks``, ``4 of 5``, and never ``-0.0``."""

from collections.abc import Sequence


def counted(number: int, noun: str) -> str:
    """Return the number with its noun, in the plural where it is not one."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def task_place(task: int, tasks: int, domains: Sequence[str] = ()) -> str:
    """Return ``4 of 5``, in a domain-incremental run ``4 of 5 (domain sketch)``; ``task`` counts from 0."""
    named = f" (domain {domains[task]})" if domains and domains[task] else ""
    return f"{task + 1} of {tasks}{named}"


def fixed(value: float | None, digits: int) -> str:
    """Return ``value`` with so many digits after the point; what rounds to zero has no sign; a dash for None."""
    return "–" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"
