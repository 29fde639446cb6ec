"""What fails on other versions of PyTorch (and of the Triton that goes with each) than the one that CI runs, and why.

conftest.py expects these failures, and a pass is one: so the list stays true when somebody runs the tests there.
"""

import torch

OLD = torch.__version__ < "2.13"  # tried: 2.11.0 with Triton 3.6 (and NumPy 2.3, the last that its interpreter takes)
NEW = torch.__version__ >= "2.14"  # tried: 2.14.1 with Triton 3.8

_RULES = "tests/forward/rules/"
_NAN = "lp_pool of the norm inf is wrong and its gradient nan, of plain tensors too"
_ORDER = "Dynamo compares a number with what is no tensor by itself, and gives up"
_SPILLS = "this Triton spills a few instructions of query_kernel's inner loop on sm_80 in full float32"

# (on which versions, the beginning of a test's name, why it fails there)
DIFFERENCES = [
    (OLD, f"{_RULES}test_corners.py::test_what_has_no_rule_is_loud[<lambda>13]", "no F.linear_cross_entropy yet"),
    (OLD, f"{_RULES}test_operator_database.py::test_an_operator_is_right_or_refused_as_the_page_says[narrow_copy]",
     "narrow_copy has no backward"),
    (OLD, f"{_RULES}test_operator_database.py::test_every_rule_is_tested_here_or_in_the_table",
     "its database has no native_group_norm"),
    *((OLD, f"{_RULES}test_table.py::{test}[lp_pool{dims}d-2]", _NAN)  # the third case
      for test in ("test_gradient_through_the_tangent", "test_detached_tangent_leaves_the_primal_gradient_alone")
      for dims in (1, 2, 3)),
    (OLD, "tests/forward/test_dual.py::test_operators_compile[number dual-lt", _ORDER),
    (OLD, "tests/forward/test_dual.py::test_operators_compile[number dual-ge", _ORDER),
    (OLD, "tests/forward/test_interception.py::test_a_pass_sees_it_eager_and_compiled[as_tensor]",
     "Dynamo does not show us torch.as_tensor of a Dual"),
    (OLD or NEW, "tests/ops/test_compile_gate.py::test_every_kernel_compiles_for_every_chip_and_fits[defaults]",
     _SPILLS),
]  # fmt: skip
