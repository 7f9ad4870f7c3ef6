"""docs/models.md says what the families of transformers are; this says that it is so."""

from __future__ import annotations

import families
import pytest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_docs_table_of_families_is_what_they_are() -> None:
    found = families.quietly(lambda: dict(families.verdicts()))
    assert not [kind for kind, said in found.items() if said.startswith("WRONG")]
    _, _, rest = families.PAGE.read_text().partition(families.BEGIN)
    assert rest.partition(families.END)[0] == families.page(found)


def test_a_family_is_exact_or_refused_with_its_reason() -> None:
    assert families.quietly(lambda: families.verdict("qwen2")) == "exact"
    assert "ALiBi" in families.quietly(lambda: families.verdict("bloom"))
