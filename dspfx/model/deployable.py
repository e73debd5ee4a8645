"""What can be deployed: a module in evaluation mode, and no gates in it any more."""

from torch import nn

from dspfx.errors import DspfxError
from dspfx.model.module import PreparedModule


def check_deployable(model: nn.Module, verb: str, failure: type[DspfxError]) -> None:
    """Refuse what still learns, and what is no module.

    Args:
        model: what a user would deploy.
        verb: what is to be done with it.
        failure: what is raised.

    Raises:
        DspfxError: the `failure`.
    """
    if not isinstance(model, nn.Module):
        raise failure(
            f"a {type(model).__name__} is no torch.nn.Module; {verb} the model that dspfx.convert "
            "returned"
        )
    if any(isinstance(module, PreparedModule) for module in model.modules()):
        raise failure(f"the model is prepared; {verb} what dspfx.convert makes of it")
    if any(module.training for module in model.modules()):
        raise failure("the model is in training mode; call model.eval() first")
