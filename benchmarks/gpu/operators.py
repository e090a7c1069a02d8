"""Are the operators well-formed on this device? `torch.library.opcheck`: schema, fake tensors, autograd, tracing."""

from __future__ import annotations

import torch

from hfquant.backend import load_all

from .findings import Findings
from .setting import Setting
from .weights import FORMATS, random_input, random_packed

CHECKED = ("int4 g128", "w8a8", "fpq w4a8")  # one of each kernel; opcheck cannot handle float8 tensors
SHAPE, ROWS = (16, 128), 3


def run(setting: Setting, findings: Findings) -> None:
    """`linear` for one layer of each kernel, and the other operators."""
    load_all()
    for name in setting.while_time(findings, "formats", CHECKED):
        tensors, spec = random_packed(SHAPE, FORMATS[name], setting.device)
        packed, key = list(tensors.values()), spec.key()
        x = random_input(ROWS, SHAPE[1], setting.device).requires_grad_()
        bias = torch.zeros(SHAPE[0], device=setting.device, dtype=x.dtype, requires_grad=True)
        with findings.row(operator="linear", format=name) as line:
            line["result"] = torch.library.opcheck(torch.ops.hfquant.linear.default, (x, packed, bias, key))
        if name != CHECKED[0]:
            continue
        grad = random_input(ROWS, SHAPE[0], setting.device)
        ids = torch.tensor([[0, 3], [7, 1]], device=setting.device)
        calls = {
            "input_grad": (torch.ops.hfquant.input_grad.default, (grad, packed, key)),
            "dequantize": (torch.ops.hfquant.dequantize.default, (packed, key, torch.bfloat16)),
            "embedding": (torch.ops.hfquant.embedding.default, (ids, packed, key, torch.bfloat16)),
        }
        for operator, (function, arguments) in calls.items():
            with findings.row(operator=operator, format=name) as line:
                line["result"] = torch.library.opcheck(function, arguments)
