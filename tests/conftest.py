import torch
from hypothesis import settings

torch.set_num_threads(1)  # the tensors are small, and threads would slow the tests down

settings.register_profile("tests", deadline=None)  # a busy machine makes any example slow
settings.load_profile("tests")
