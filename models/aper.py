"""APER: cosine similarity to the class means of the plain and the adapted feature side by side.

Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models: Generalizability and Adaptivity are All
You Need", IJCV 2024 (arXiv 2303.07338, 2023), Section 5, with adapters that were trained on the first task
(``models/first_session.py``).
"""

from models.simplecil import SimpleCIL
from utils.config.methods import Method

METHOD = Method(
    "aper",
    "cosine similarity to the class means of the plain and the adapted feature side by side",
    fixed=(("first_session", "adapter"),),
    plain_too=True,
)


class APER(SimpleCIL):
    """SimpleCIL on features ``(samples, 2 · dim)``: the frozen backbone's own, then those with adapters, unscaled."""
