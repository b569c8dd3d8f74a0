"""Names of classes and domains: one form for those that look the same."""

import logging
import unicodedata
from collections.abc import Collection, Iterable

from utils.errors import DataError

log = logging.getLogger(__name__)


def normal_name(name: str) -> str:
    """The one form of a name: composed Unicode (NFC), without spaces at its ends."""
    return unicodedata.normalize("NFC", name).strip() or name


def by_normal_name(names: Iterable[str], where: str) -> dict[str, str]:
    """Normal form -> name as it is written, in the order of ``names``.

    Raises:
        DataError: two of them have one normal form.
    """
    found: dict[str, str] = {}
    for name in names:
        if (other := found.setdefault(normal_name(name), name)) != name:
            raise DataError(
                f"{where} has {other!a} and {name!a}, which look the same; rename one, or put together what is in them"
            )
    return found


def same_name(name: str, known: Collection[str]) -> str | None:
    """The one of ``known`` that is the same name: in its normal form, else the only one of another letter case."""
    normal = normal_name(name)
    for form in (normal_name, _without_case):
        if len(alike := [other for other in known if form(other) == form(normal)]) == 1:
            return alike[0]
    return None


def spelled_as(names: Iterable[str], known: Collection[str], what: str, where: str) -> dict[str, str]:
    """Each of ``names`` -> how ``known`` spells it; itself where ``known`` lacks it. Letter case is said in the log.

    Names that ``known`` holds beside each other in two letter cases, as a case-sensitive disk allows, stay two.
    """
    spelled, names = {}, list(names)
    free = [name for name in known if name not in names]  # these have no partner of the very same spelling
    for name in names:
        partner = None if name in known else same_name(name, free)
        spelled[name] = partner or name
        if partner is not None:
            free.remove(partner)
            if normal_name(partner) != normal_name(name):
                log.warning("%s %r in %s is taken for %r: they differ in letter case alone", what, name, where, partner)
    return spelled


def _without_case(name: str) -> str:
    return normal_name(name).casefold()
