"""Of sound programs nothing is called an error or a warning, however unusual they are.

They are trained: `pytest -m slow tests/diagnose/test_benign.py`.
"""

import pytest

from attnscope.diagnose import diagnose
from tests.diagnose.benign import PROGRAMS

pytestmark = pytest.mark.slow


def more_than_notes(run):
    found = diagnose(run)
    for finding in found:
        print(f"{finding.severity} {finding.rule}: {finding.summary}")
    return [(finding.severity, finding.rule) for finding in found if finding.severity != "note"]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_sound_program_is_left_alone(tmp_path, program):
    run = program(tmp_path / "run")
    assert run.steps["loss"].notna().all(), "it was watched"
    assert more_than_notes(run) == []


@pytest.mark.parametrize("name", ["hf_t5", "hf_gpt2", "hf_bert", "hf_vit"])
def test_a_sound_hugging_face_model_is_left_alone(tmp_path, name):
    pytest.importorskip("transformers", reason="Hugging Face models")
    from tests.diagnose import benign_hugging_face

    run = getattr(benign_hugging_face, name)(tmp_path / "run")
    assert run.steps["loss"].notna().all(), "it was watched"
    assert more_than_notes(run) == []
