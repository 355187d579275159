"""The rules' logic, on tensors."""

import pytest
import torch

from fastshard.archive import rules, verdict
from fastshard.archive.rules import Reason, Truth

X = torch.linspace(0.1, 4.0, 64).view(4, 16)
EAGER = X.exp()
GOLDEN = X.double().exp()
TRUTH = Truth([EAGER], [GOLDEN])


def kind(reason: Reason | None) -> str | None:
    return reason and reason.verdict


def changed(index, value):
    out = EAGER.clone()
    out.view(-1)[index] = value
    return [out]


def test_the_reference_itself_is_right():
    assert rules.check_answer([EAGER], TRUTH, poison=0xFF, earlier=[]) is None
    assert rules.check_answer([GOLDEN.float()], TRUTH) is None


def test_twice_eagers_error_is_allowed_and_no_more():
    eager = GOLDEN.float() * (1 + 1e-4)
    truth = Truth([eager], [GOLDEN])
    assert rules.check_answer([GOLDEN.float() * (1 + 1.9e-4)], truth) is None
    reason = rules.check_answer([GOLDEN.float() * (1 + 2.2e-4)], truth)
    assert kind(reason) == verdict.INACCURATE
    assert reason.text.startswith("largest error 1.2e-02, eager 5.5e-03, of 5.5e+01")


def test_float32_may_be_summed_in_another_order_and_not_in_tf32():
    torch.manual_seed(0)
    a, b = torch.randn(2, 64, 2048)
    products = a.double() * b.double()
    golden = products.sum(1)
    in_order = torch.zeros(64)
    for product in products.float().T:
        in_order += product
    truth = Truth([golden.float()], [golden])  # of which twice the error is less
    assert rules.FACTOR * (golden.float() - golden).abs().max() < (in_order - golden).abs().max()
    assert rules.check_answer([in_order], truth) is None
    tf32 = [(x.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32).double() for x in (a, b)]
    reason = rules.check_answer([(tf32[0] * tf32[1]).sum(1).float()], truth)
    assert kind(reason) == verdict.INACCURATE


def test_every_part_of_a_large_answer_is_compared(monkeypatch):
    whole = rules.check_answer([EAGER + 0.5], TRUTH)
    assert whole.text.startswith("largest error 5.0e-01, eager ")
    monkeypatch.setattr(rules, "CHUNK", 24)  # of 64
    for index in (0, 23, 24, 48, 63):
        assert kind(rules.check_answer(changed(index, 200.0), TRUTH)) == verdict.WRONG
        text = "1 of 64 elements are not finite, or should not be"
        assert rules.check_answer(changed(index, torch.inf), TRUTH).text == text
    numbers = torch.arange(64)
    truth = Truth([numbers], [numbers])
    assert rules.check_answer([numbers], truth) is None
    assert rules.check_answer([numbers.flip(0)], truth).text == "64 of 64 elements differ"
    assert rules.check_answer([EAGER], TRUTH) is None
    assert rules.check_answer([EAGER + 0.5], TRUTH) == whole


def test_the_mean_is_held_to_it_too(monkeypatch):
    golden = torch.full((1000,), 1e-3, dtype=torch.float64)
    golden[0] = 1.0
    eager = golden.float()
    eager[0] += 1e-3  # which lets the largest error be 2e-3 anywhere
    reason = rules.check_answer([eager + 5e-4], Truth([eager], [golden]))
    assert kind(reason) == verdict.INACCURATE
    assert reason.text.startswith("mean error ")
    monkeypatch.setattr(rules, "CHUNK", 300)  # of 1000
    assert rules.check_answer([eager + 5e-4], Truth([eager], [golden])) == reason


def test_an_error_that_is_no_rounding_is_wrong():
    reason = rules.check_answer(changed(5, float(EAGER.max()) / 2), TRUTH)
    assert kind(reason) == verdict.WRONG


@pytest.mark.parametrize(
    ("actual", "text"),
    [
        ([], "0 tensors came, the reference has 1"),
        ([EAGER, EAGER], "2 tensors came, the reference has 1"),
        ([EAGER[:, :8]], r"answer 0 is of shape [4, 8], not [4, 16]"),
        ([EAGER.half()], "answer 0 is of float16, not float32"),
        (changed(3, float("nan")), "1 of 64 elements are not finite, or should not be"),
        (changed(3, float("inf")), "1 of 64 elements are not finite, or should not be"),
    ],
)
def test_wrong_answers(actual, text):
    assert rules.check_closeness(actual, TRUTH) == Reason(verdict.WRONG, text)


def test_what_is_not_finite_must_not_be():
    inf = float("inf")
    eager = torch.tensor([inf, -inf, float("nan"), 1.0])
    truth = Truth([eager], [eager.double()])
    assert rules.check_closeness([eager.clone()], truth) is None
    for i, other in ((0, 1.0), (0, -inf), (1, inf), (2, inf), (2, 0.0)):
        out = eager.clone()
        out[i] = other
        assert kind(rules.check_closeness([out], truth)) == verdict.WRONG


def test_where_eager_overflows_alone_anything_goes():
    golden = torch.tensor([1e39, 1.0], dtype=torch.float64)
    truth = Truth([golden.float()], [golden])
    assert rules.check_closeness([torch.tensor([3e38, 1.0])], truth) is None
    assert kind(rules.check_closeness([torch.tensor([3e38, 2.0])], truth)) == verdict.WRONG


def test_integers_must_be_equal_where_rounding_decides_nothing():
    eager, golden = torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4])
    truth = Truth([eager], [golden])
    assert rules.check_closeness([torch.tensor([1, 2, 9])], truth) is None
    reason = rules.check_closeness([torch.tensor([1, 9, 3])], truth)
    assert reason == Reason(verdict.WRONG, "1 of 3 elements differ")


@pytest.mark.parametrize("poison", rules.POISONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
def test_poison_is_found(poison, dtype):
    out = torch.ones(4, 8, dtype=dtype)
    out.view(-1).view(torch.uint8)[: 3 * out.element_size()] = poison
    assert rules.count_poison(out, poison) == 3
    assert rules.count_poison(out.t(), poison) == 3
    assert rules.count_poison(out, 0x55) == 0
    assert rules.count_poison(torch.ones(3, dtype=torch.bool), 1) == 0
    assert rules.count_poison(torch.empty(0, dtype=dtype), poison) == 0


def test_what_was_not_written_has_a_verdict_of_its_own():
    out = EAGER.clone()
    out.view(-1).view(torch.uint8)[40:48] = 0xFF
    reason = rules.check_answer([out], TRUTH, poison=0xFF)
    text = "2 of 64 elements are what its memory held before"
    assert reason == Reason(verdict.NOT_WRITTEN, text)
    assert kind(rules.check_answer([out], TRUTH, poison=0x3E)) == verdict.WRONG


def test_poison_that_is_the_right_answer_is_none():
    eager = torch.full((8,), -1)  # whose bytes are those of the poison
    assert rules.check_answer([eager], Truth([eager], [eager]), poison=0xFF) is None
    out = eager.clone()
    out[0] = 5
    assert kind(rules.check_answer([out], Truth([eager], [eager]), poison=0xFF)) == verdict.WRONG


def test_poison_that_comes_by_chance_is_no_reason():
    torch.manual_seed(0)
    eager = 2 * torch.rand(200_000).half()
    truth = Truth([eager], [eager.double()])
    wrong = eager.flip(0)
    assert rules.count_poison(wrong, 0x3E) > rules.count_poison(eager[:1000], 0x3E) + 50
    assert kind(rules.check_answer([wrong], truth, poison=0x3E)) == verdict.WRONG
    wrong[:1000].view(torch.uint8).fill_(0x3E)
    assert kind(rules.check_answer([wrong], truth, poison=0x3E)) == verdict.NOT_WRITTEN


def test_an_earlier_answer_has_a_verdict_of_its_own():
    other = Truth([EAGER + 1], [GOLDEN + 1])
    assert kind(rules.check_answer([EAGER + 1], TRUTH, earlier=[other])) == verdict.STALE
    assert kind(rules.check_answer([EAGER + 1], TRUTH)) == verdict.WRONG


def test_inputs_may_change_where_the_reference_changes_them():
    assert rules.check_inputs([], TRUTH) is None
    assert rules.check_inputs([1], Truth([], [], edited=frozenset({1}))) is None
    reason = rules.check_inputs([1, 0], Truth([], [], edited=frozenset({1})))
    assert reason == Reason(verdict.EDITED_INPUTS, "tensor 0 of its arguments changed")


def test_answers_may_lie_where_the_references_do():
    assert rules.check_memory([], False, TRUTH) is None
    assert rules.check_memory([2], False, Truth([], [], aliased=frozenset({2}))) is None
    reason = rules.check_memory([2], False, TRUTH)
    text = "its answer lies in tensor 2 of its arguments"
    assert reason == Reason(verdict.SHARED_MEMORY, text)
    reason = rules.check_memory([], True, TRUTH)
    assert reason == Reason(verdict.SHARED_MEMORY, "two calls returned the same memory")


def test_guards_and_order():
    assert rules.check_guards("") is None
    reason = rules.check_guards("byte 1 after a buffer of 8 bytes")
    text = "it wrote to byte 1 after a buffer of 8 bytes"
    assert reason == Reason(verdict.OUT_OF_BOUNDS, text)
    assert rules.check_order(False) is None
    assert kind(rules.check_order(True)) == verdict.UNORDERED


def test_one_answer_to_all_is_vacuous():
    ones = [Truth([torch.ones(4)], [torch.ones(4).double()])] * 3
    text = "3 sets of inputs, seeds and scales apart, have one answer"
    assert rules.check_vacuous(ones) == Reason(verdict.VACUOUS, text)
    assert rules.check_vacuous(ones[:1]) is None
    assert rules.check_vacuous([*ones, Truth([torch.zeros(4)], [torch.zeros(4).double()])]) is None


def test_the_clock_outside():
    assert rules.check_clock(100.0, 404.0, "cpu") is None
    reason = rules.check_clock(100.0, 406.0, "cpu")
    text = "its process says 100 us a call, a clock outside 406 us"
    assert reason == Reason(verdict.TOO_FAST, text)
    assert rules.check_clock(100.0, 424.0, "cuda") is None
    assert kind(rules.check_clock(100.0, 426.0, "cuda")) == verdict.TOO_FAST


def test_the_physical_limit():
    rates = {"gbps": 1000.0, "tflops": 2.0, "cache_bytes": 1000}
    assert rules.least_us(10**6, 1000, rates) == pytest.approx(1.0)
    assert rules.least_us(10**6, 10**6 + 1000, rates) == pytest.approx(2.0)
    assert rules.check_limit(0.96, 1.0) is None
    reason = rules.check_limit(0.9, 1.0)
    text = "0.9 us, less than the 1 us that the device takes at least"
    assert reason == Reason(verdict.TOO_FAST, text)


def test_fewer_operations_than_the_reference_are_no_reason_to_reject():
    rates = {"gbps": 1000.0, "tflops": 2.0, "cache_bytes": 1000}
    assert rules.does_fewer_flops(3.7, 8 * 10**6, rates)
    assert not rules.does_fewer_flops(3.9, 8 * 10**6, rates)
    assert not rules.does_fewer_flops(1e-3, 0, rates)
