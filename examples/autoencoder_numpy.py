"""Train a small autoencoder on real images in plain NumPy: the part that one would copy is the loop at the end.

python examples/autoencoder_numpy.py    (needs scikit-learn, for its sample photographs)
"""

import numpy as np
import numpy as xp
from sklearn.datasets import load_sample_images

import fastloss as fl

# uint8 patches of 8 x 8 pixels in 3 colours: (patches, 192)
windows = [np.lib.stride_tricks.sliding_window_view(image, (8, 8), (0, 1))[::4, ::4] for image in load_sample_images().images]
images = xp.asarray(np.random.default_rng(0).permutation(np.concatenate([w.reshape(-1, 192) for w in windows])))

rng = np.random.default_rng(1)
encode = xp.asarray(rng.standard_normal((192, 48)) / 8, xp.float32)
decode = xp.asarray(rng.standard_normal((48, 192)) / 48, xp.float32)
bias = xp.zeros(192, xp.float32)
rate = xp.float32(1e-2)

floor = fl.binary_entropy(images, target_scale=1 / 255, reduction="batchmean")  # no model gets below

for step in range(300):
    batch = images[step * 512 % (len(images) - 512) :][:512]
    x = batch * xp.float32(1 / 255) - xp.float32(0.5)
    code = xp.tanh(x @ encode)
    logits = code @ decode + bias

    # value and gradient in one pass; targets are the uint8 images, and the gradient replaces the logits
    loss, slope = fl.binary_cross_entropy_with_logits.value_and_grad(logits, batch, target_scale=1 / 255, reduction="batchmean", out=logits)

    encode_slope = x.T @ (slope @ decode.T * (1 - code**2))
    decode -= rate * (code.T @ slope)
    encode -= rate * encode_slope
    bias -= rate * slope.sum(axis=0)
    if step % 50 == 0 or step == 299:
        print(f"step {step:3d}: {float(loss):.1f} nats a patch, above the floor by {float(loss - floor):.2f}")
