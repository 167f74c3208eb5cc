"""What .ci/sanitize builds from: its edits must fit csrc as it is, or the run at the end of CI cannot begin."""

import shutil
from pathlib import Path

import pytest
import sanitize

CSRC = Path(__file__).parents[2] / "csrc"


@pytest.mark.parametrize("self_test", [False, True])
def test_the_edits_fit_the_sources(tmp_path, self_test):
    folder = shutil.copytree(CSRC, tmp_path / "csrc")
    sanitize.prepare(folder, self_test)
    for name, _, new in sanitize.EDITS + (sanitize.SELF_TEST_EDITS if self_test else []):
        assert new in (folder / name).read_text()


@pytest.mark.parametrize("there", [False, True])
def test_the_tiles_of_avx512_are_checked_everywhere(tmp_path, monkeypatch, there):
    monkeypatch.setattr(sanitize, "has_avx512", lambda: there)
    folder = shutil.copytree(CSRC, tmp_path / "csrc")
    sanitize.prepare(folder, False)
    for name, old, new in sanitize.WITHOUT_AVX512_EDITS:
        assert (old if there else new) in (folder / name).read_text()


def test_an_edit_that_no_longer_fits_names_its_file(tmp_path):
    folder = shutil.copytree(CSRC, tmp_path / "csrc")
    (folder / "cpu/simd.h").write_text("namespace soap_opt {}\n")
    with pytest.raises(SystemExit, match=r"csrc/cpu/simd\.h has nothing like 'inline int isa_level\(\)"):
        sanitize.prepare(folder, False)
