"""Stand-ins for the score norm, each named for what it leaves out, and one measure of how wrong they are.

    sketch       ScoreTape(model, norm="sketch")                 unbiased; error up to about sqrt(2 / columns) a layer
    last block   ScoreTape(model, parameters=last_block(model))  exact norm of the last block's score only
    norm layers  ScoreTape(model, parameters=norm_layers(model)) exact norm of the normalizations' scales and shifts
                 only, which arXiv 2411.00999 finds to follow the total
    logit proxy  logit_sq_norms(logits, token, mask)             score with respect to the logits; forward alone

A baseline needs norms only up to a common factor, so `norm_error` compares shapes, not sizes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vcposim.errors import InputError


def logit_sq_norms(logits: Tensor, token: Tensor, mask: Tensor) -> Tensor:
    """sum_t mask_t ||e(y_t) - pi_t||^2 = sum_t mask_t (1 - 2 pi(y_t) + sum_v pi(v)^2): (n,).

    logits (n, t, vocabulary), entry j predicting token j + 1; token, mask (n, t). The score with respect to the
    logits, as if positions never added up; no backward.
    """
    log_p = F.log_softmax(logits[:, :-1].detach().float(), -1)
    chosen = log_p.gather(2, token[:, 1:, None]).squeeze(2).exp()
    square = 1 - 2 * chosen + log_p.mul(2).exp().sum(-1)
    return torch.where(mask[:, 1:] != 0, square, 0).sum(1)


def last_block(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of the last of the model's repeated blocks.

    Raises `InputError` for a model without a list of blocks.

    >>> last_block(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 3)])}))[0].shape
    torch.Size([3, 2])
    """
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not stacks:
        raise InputError("last_block: the model holds no nn.ModuleList of blocks; pass the parameters yourself")
    return list(max(stacks, key=len)[-1].parameters())


def norm_layers(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of the model's normalizations, which are known by the names of their classes.

    Raises `InputError` for a model without norm layers.

    >>> [p.shape for p in norm_layers(nn.Sequential(nn.Linear(2, 3), nn.RMSNorm(3)))]
    [torch.Size([3])]
    """
    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    found = list(dict.fromkeys(p for module in norms for p in module.parameters(recurse=False)))
    if not found:
        raise InputError("norm_layers: no module's class has 'norm' in its name; pass the parameters yourself")
    return found


def norm_error(estimate: Tensor, exact: Tensor) -> dict[str, float]:
    """How an `estimate` (n,) of squared norms differs from the `exact` (n,) ones.

    `scale`: the factor that fits best in log space; `relative_sd`: rms of estimate / (scale exact) - 1;
    `correlation`: Pearson's, of the logs.

    >>> norm_error(torch.tensor([2.0, 4.0, 8.0]), torch.tensor([1.0, 2.0, 4.0]))
    {'scale': 2.0, 'relative_sd': 0.0, 'correlation': 1.0}
    """
    ratio = (estimate.double() / exact.double()).log()
    scale = ratio.mean().exp()
    spread = (estimate.double() / (scale * exact.double()) - 1).square().mean().sqrt()
    correlation = torch.corrcoef(torch.stack([estimate, exact]).double().log())[0, 1]
    return {
        "scale": round(float(scale), 12),
        "relative_sd": float(spread),
        "correlation": round(float(correlation), 12),
    }
