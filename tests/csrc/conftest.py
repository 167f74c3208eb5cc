from pathlib import Path

import pytest
import torch
from harness import HERE, build


@pytest.fixture(scope="session")
def fibers(tmp_path_factory):
    """torch.ops.soap_opt_fibers."""
    torch_folder = Path(torch.__file__).parent
    flags = ["-O1", "-shared", "-fPIC", f"-isystem{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"]
    library = build(
        [HERE / "operator_on_fibers.cpp"],
        tmp_path_factory.mktemp("fibers") / "operator_on_fibers.so",
        [*flags, f"-Wl,-rpath,{torch_folder / 'lib'}"],
        libraries=["-ltorch_cpu", "-lc10"],
    )
    torch.ops.load_library(str(library))
    return torch.ops.soap_opt_fibers
