"""Train a small autoencoder on photographs in plain NumPy. The loop at the end shows how to use fastloss.

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

floor = fl.binary_entropy(images, target_scale=1 / 255, reduction="batchmean")  # the loss of a perfect model

for step in range(300):
    batch = images[step * 512 % (len(images) - 512) :][:512]
    x = batch * xp.float32(1 / 255) - xp.float32(0.5)
    code = xp.tanh(x @ encode)
    logits = code @ decode + bias

    # value and gradient in one pass over memory; the targets are uint8 images, and the gradient overwrites the logits
    loss, grad = fl.binary_cross_entropy_with_logits.value_and_grad(logits, batch, target_scale=1 / 255, reduction="batchmean", out=logits)

    encode_grad = x.T @ (grad @ decode.T * (1 - code**2))
    decode -= rate * (code.T @ grad)
    encode -= rate * encode_grad
    bias -= rate * grad.sum(axis=0)
    if step % 50 == 0 or step == 299:
        print(f"step {step:3d}: {float(loss):.1f} nats per patch, above the floor by {float(loss - floor):.2f}")
