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


@pytest.mark.parametrize("kind", ["granite", "cohere", "minicpm3"])
def test_scales_of_logits_are_read_where_the_family_has_them(kind: str) -> None:
    """Granite divides its logits, Cohere multiplies them, MiniCPM3 divides the rows before."""
    if kind not in families.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {kind}")
    assert families.quietly(lambda: families.verdict(kind)) == "exact"
