"""A job is checked against the room that its prompt leaves."""

import pytest

from rudder.server.service.errors import Refusal
from rudder.server.service.prepare import require_room_for_logprobs, with_max_tokens
from rudder.server.service.sampling import sampling_of
from rudder.v1 import inference_pb2


@pytest.mark.parametrize("prompt", range(1, 20))
@pytest.mark.parametrize("minimum", [None, 0, 1, 5, 16, 19])
@pytest.mark.parametrize("maximum", [None, 1, 10, 19])
def test_tokens_that_do_not_fit_are_refused_by_name(prompt: int, minimum: int | None, maximum: int | None) -> None:
    sampling = inference_pb2.Sampling(min_tokens=minimum, max_tokens=maximum)
    if (minimum or 0) > (16 if maximum is None else maximum):
        return  # refused by the table of limits
    room = 20 - prompt
    if (minimum or 0) > room or (maximum or 0) > room:
        with pytest.raises(Refusal) as caught:
            with_max_tokens(sampling, prompt, 20)
        field = "sampling.max_tokens" if (maximum or 0) > room else "sampling.min_tokens"
        assert [violation.field for violation in caught.value.violations] == [field]
    else:
        # vLLM itself accepts what is left.
        assert sampling_of(with_max_tokens(sampling, prompt, 20), 0, 0).max_tokens == min(maximum or 16, room)


def test_log_probabilities_of_a_prompt_that_no_message_holds_are_refused() -> None:
    sampling = inference_pb2.Sampling(prompt_logprobs=20)
    require_room_for_logprobs(sampling, 1000, 1 << 20)
    require_room_for_logprobs(inference_pb2.Sampling(), 10**6, 1 << 20)
    with pytest.raises(Refusal, match=r"sampling\.prompt_logprobs"):
        require_room_for_logprobs(sampling, 100_000, 1 << 20)


def test_first_choice_alone_has_the_log_probabilities_of_the_prompt() -> None:
    sampling = inference_pb2.Sampling(prompt_logprobs=3, n=3)
    assert [sampling_of(sampling, choice, 0).prompt_logprobs for choice in range(3)] == [3, None, None]
