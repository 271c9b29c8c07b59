"""Train a small network on scikit-learn's digits to 95 % zeros: `python examples/minimal.py`."""

from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import feather_param

torch.manual_seed(0)
pixels, digits = load_digits(return_X_y=True)
arrays = train_test_split(pixels.astype("float32") / 16, digits, random_state=0)
train_x, test_x, train_y, test_y = map(torch.as_tensor, arrays)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(train_x, train_y), batch_size=64, shuffle=True)
epochs = 20

model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
controller = feather_param.sparsify(model, final_rate=0.95, total_steps=len(loader) * epochs)  # added
for _ in range(epochs):
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        controller.step()  # added
print(controller.report())
feather_param.desparsify(model)  # added

feather_param.save_sparse(model.state_dict(), "digits.safetensors")
accuracy = (model(test_x).argmax(dim=1) == test_y).float().mean()
print(f"test accuracy {accuracy:.1%}, file {Path('digits.safetensors').stat().st_size / 1e3:.1f} kB")
