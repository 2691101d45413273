"""Every family, quantized by every method, is the same model once stock Transformers has reloaded it."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from hfcompress.packed import packed_layers
from hfcompress.packed.bytes import byte_layers
from hfcompress.quantization import AWQ, GPTQ, RTN, Float8, SmoothQuant, quantize
from tests.families import FAMILIES, inputs_of
from tests.reloading import Case, Cases, reload_all

METHODS = {
    "rtn": RTN(bits=4, group_size=16),
    "affine": RTN(bits=4, symmetric=False),
    "gptq": GPTQ(bits=3, group_size=16),
    "awq": AWQ(bits=4, group_size=16),
}
# Weights and inputs in 8 bits; the rest is refused, with the reason.
BYTES = {
    "w8a8": RTN(activations=8),
    "smoothquant": SmoothQuant(),
    "float8": Float8(),
    "fp8": Float8(activations=True),
}
# What the others leave out of the format, in one family.
OF_LLAMA = {
    "affine2": RTN(bits=2, symmetric=False),
    "affine3": GPTQ(bits=3, group_size=16, symmetric=False),
    "affine4": AWQ(bits=4, group_size=16, symmetric=False),
    "affine8": RTN(bits=8, group_size=16, symmetric=False),
}
REFUSED_BYTES = ("gpt2", "bart", "t5", "whisper")  # test_w8a8.py has the messages
FAMILIES_OF_BYTES = [family for family in FAMILIES if family not in REFUSED_BYTES]
CASES = [(family, method) for family in FAMILIES for method in METHODS]
CASES += [(family, method) for family in FAMILIES_OF_BYTES for method in BYTES]
CASES += [("llama", method) for method in OF_LLAMA]
# These are tried with every method, each other family with one of its methods and, where time is no matter, the rest.
THOROUGHLY = ("bert", "llama", "gpt2", "t5")


def is_tried_always(family: str, method: str) -> bool:
    methods = [other for one, other in CASES if one == family]
    return family in THOROUGHLY or method == methods[list(FAMILIES).index(family) % len(methods)]


PARAMETERS = [pytest.param(*case, marks=() if is_tried_always(*case) else pytest.mark.slow) for case in CASES]


def quantized_case(family: str, method: str, folder: Path) -> Case:
    spec = FAMILIES[family]
    model, inputs = spec.model(), inputs_of(spec)
    report = quantize(model, {**METHODS, **BYTES, **OF_LLAMA}[method], calibration=[inputs])
    return Case.write(folder, model, report, inputs, "logits_per_image" if family == "clip" else "logits")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Cases:
    """The cases that were selected, reloaded by one process of each kind."""
    selected = {item.callspec.id for item in request.session.items if item.path == request.path}
    root = tmp_path_factory.mktemp("families")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*calibration tokens are fewer")
        warnings.filterwarnings("ignore", message="Group sizes that do not divide")
        warnings.filterwarnings("ignore", message="No norm ")
        made = {case: quantized_case(*case, root / "-".join(case)) for case in CASES if "-".join(case) in selected}
    reload_all(root, tmp_path_factory.mktemp("empty"))
    return made


@pytest.mark.parametrize(("family", "method"), PARAMETERS)
def test_stock_reload_gives_the_same_logits(family: str, method: str, cases: Cases) -> None:
    case = cases[family, method]
    assert {row.name for row in case.report.rows} == {*packed_layers(case.model), *byte_layers(case.model)}
    case.reloads_alike(plugins=0)


@pytest.mark.parametrize(("family", "method"), PARAMETERS)
def test_saved_before_or_after_a_call_and_by_either_way_it_has_the_same_files(
    family: str, method: str, cases: Cases
) -> None:
    cases[family, method].saved_alike()


@pytest.mark.parametrize(("family", "method"), PARAMETERS)
def test_loaded_run_and_saved_again_it_is_still_packed(family: str, method: str, cases: Cases) -> None:
    cases[family, method].reloads_alike(plugins=1)
    cases[family, method].saved_again_alike()
