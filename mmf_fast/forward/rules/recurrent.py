"""LSTM, GRU and plain recurrent layers, step by step: PyTorch's kernels for whole layers have no forward derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from mmf_fast.forward.dual import Value, primal, register_rule, tangent
from mmf_fast.forward.missing import missing_rule_error

# A step: (W_ih x + b_ih, the state (h,) or (h, c), W_hh, b_hh, W_hr or None) -> the next state.
Step = Callable[..., tuple[Value, ...]]


def lstm_step(gates: Value, state: Sequence[Value], w_hh: Value, b_hh: Value, w_hr: Value = None) -> tuple[Value, ...]:
    """i, f, g, o = gates + W_hh h + b_hh;  c' = sig(f) c + sig(i) tanh(g);  h' = sig(o) tanh(c'), or W_hr of it."""
    h, c = state
    i, f, g, o = (gates + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if w_hr is None else F.linear(h, w_hr)), c


def gru_step(gates: Value, state: Sequence[Value], w_hh: Value, b_hh: Value) -> tuple[Value, ...]:
    """r, z = sig(x + h parts);  n = tanh(x part + r (h part));  h' = (1 - z) n + z h."""
    (h,) = state
    x_r, x_z, x_n = gates.chunk(3, -1)
    h_r, h_z, h_n = F.linear(h, w_hh, b_hh).chunk(3, -1)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return (n + z * (h - n),)


def _plain_step(activation: Callable[[Value], Value]) -> Step:
    def step(gates: Value, state: Sequence[Value], w_hh: Value, b_hh: Value) -> tuple[Value, ...]:
        return (activation(gates + F.linear(state[0], w_hh, b_hh)),)

    return step


def _parts(*results: Value) -> tuple[Any, Any]:
    return tuple(map(primal, results)), tuple(map(tangent, results))


def _cell(function: Any, step: Step) -> None:
    @register_rule(function)
    def cell(input: Value, hx: Value, w_ih: Value, w_hh: Value, b_ih: Value = None, b_hh: Value = None) -> Any:
        state = hx if type(hx) in (list, tuple) else (hx,)
        after = step(F.linear(input, w_ih, b_ih), state, w_hh, b_hh)
        return _parts(*after) if len(after) > 1 else (primal(after[0]), tangent(after[0]))


def _layers(function: Any, step: Step, states: int) -> None:
    @register_rule(function)
    def layers(input: Value, hx: Value, weights: Any, *options: Any) -> tuple[Any, Any]:
        if not isinstance(options[0], bool):  # (data, batch_sizes, hx, weights, ...)
            raise missing_rule_error(function, "packed sequences have no rule, give it padded ones")
        has_biases, count, dropout, train, bidirectional, batch_first = options
        initial = hx if states > 1 else (hx,)
        directions = 2 if bidirectional else 1
        stride = len(weights) // (count * directions)
        x, last = (input.transpose(0, 1) if batch_first else input), []
        for layer in range(count):
            outputs = []
            for direction in range(directions):
                k = layer * directions + direction
                w_ih, w_hh, *rest = weights[k * stride : (k + 1) * stride]
                b_ih, b_hh = rest[:2] if has_biases else (None, None)
                projection = rest[2 if has_biases else 0 :]  # of an LSTM with proj_size
                times = F.linear(x, w_ih, b_ih).unbind(0)
                state, found = tuple(h[k] for h in initial), []
                for gates in reversed(times) if direction else times:
                    state = step(gates, state, w_hh, b_hh, *projection)
                    found.append(state[0])
                outputs.append(torch.stack(found[::-1] if direction else found))
                last.append(state)
            x = torch.cat(outputs, -1) if bidirectional else outputs[0]
            if layer + 1 < count:
                x = F.dropout(x, dropout, train)
        final = (torch.stack(list(h)) for h in zip(*last, strict=True))
        return _parts(x.transpose(0, 1) if batch_first else x, *final)


for _name, _step, _states in (
    ("lstm", lstm_step, 2),
    ("gru", gru_step, 1),
    ("rnn_tanh", _plain_step(torch.tanh), 1),
    ("rnn_relu", _plain_step(torch.relu), 1),
):
    _layers(getattr(torch, _name), _step, _states)
    _cell(getattr(torch, f"{_name}_cell"), _step)
