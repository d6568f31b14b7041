"""Whatever a script calls its modules, a terminal is not driven by it."""

import os
import pty
import subprocess
import sys

SCRIPT = r"""
import torch
from torch import nn
blocks = nn.ModuleDict({"\x1b[31mred\nx\x07": nn.MultiheadAttention(8, 2, batch_first=True)})
optimizer = torch.optim.SGD(blocks.parameters(), 0.1)
for _ in range(3):
    x = torch.randn(2, 5, 8)
    for block in blocks.values():
        loss = block(x, x, x)[0].sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


def test_names_of_modules_are_shown_without_their_escape_codes(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    ours, theirs = pty.openpty()  # where nothing is filtered, as it is on the way into a pipe
    process = subprocess.Popen(
        [sys.executable, "-m", "attnscope", "watch", "--name", "r", "train.py"],
        cwd=tmp_path,
        stderr=theirs,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # nobody writes any more
            break
        if not piece:
            break
        said += piece
    os.close(ours)
    assert process.wait() == 0
    text = said.decode()
    assert "1 attention layers (�[31mred�x�), 3 optimizer updates" in text
    assert all(letter.isprintable() or letter in "\r\n" for letter in text)
