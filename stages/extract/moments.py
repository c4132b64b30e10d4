"""Moments of decoded features on the device that holds them, where that is no processor.

The counterpart in torch of `store.statistics.Moments.of`; on a processor that is the faster one.

Letters: `B` batch, `L` tokens of an image, `C` channels.
"""

from torch import Tensor

from store.statistics import Moments


def token_moments(values: Tensor, covariance: bool) -> list[Moments]:
    """Return the moments over the tokens of B h w C float32: of each image, or of all of them.

    One for all with `covariance`, for each is C x C then. Sums of values and of squares are in
    float64, products of different channels in float32.
    """
    tokens = values.flatten(1, 2)
    if covariance:
        tokens = tokens.flatten(0, 1)[None]
    exact = tokens.double()
    mean = exact.mean(dim=1)
    deviations = exact - mean[:, None]
    m2 = deviations.square().sum(dim=1)
    comoments: list[Tensor] | list[None] = [None] * len(tokens)
    if covariance:
        single = deviations[0].float()
        product = (single.T @ single).double()
        comoments = [product.diagonal_scatter(m2[0])]
    return [
        Moments(
            count=tokens.shape[1],
            mean=one.cpu().numpy(),
            m2=squares.cpu().numpy(),
            comoment=None if comoment is None else comoment.cpu().numpy(),
        )
        for one, squares, comoment in zip(mean, m2, comoments, strict=True)
    ]
