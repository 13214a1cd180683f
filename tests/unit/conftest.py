"""Tiny tensors: threads cost more than they give. No time limit for one example, which a busy machine exceeds."""

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("rudder", deadline=None)
hypothesis.settings.load_profile("rudder")
