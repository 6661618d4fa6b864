"""How an answer is called that is more than a function of arrays. The oracle is called in the same way.

These run in the process that tries answers, except for the oracle's turn. Each returns Named values.
"""


class Named(dict):
    """Results by name, in order."""


def gradients(function, names, args):
    """The result of a function of tensors, and the gradients of those with floats. names: what args are called."""
    given = [_tracked(a) for a in args]
    result = function(*given)
    out = Named(result=result)
    if hasattr(result, "requires_grad"):
        pull(result)
        out.update({f"gradient of {n}": a.grad for n, a in zip(names, given) if hasattr(a, "grad") and a.requires_grad})
    return out


def memory(function, args, kwargs):
    """The result of a function, and the most bytes that Python and NumPy took at once while it was made."""
    import tracemalloc

    tracemalloc.start()
    try:
        return Named(named_parts(function(*args, **kwargs)), peak=tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


def named_parts(result):
    """A result by name: {"result": it}, and of a tuple each part."""
    return {f"result {i}": part for i, part in enumerate(result)} if isinstance(result, tuple) else {"result": result}


def text(answer):
    """A string that was handed in, as bytes."""
    import numpy as np

    value = answer.value()
    if not isinstance(value, str):
        raise TypeError(f"a string of CUDA source is expected, {type(value).__name__} was given")
    return Named(text=np.frombuffer(value.encode(), np.uint8))


def parameters(make_module, make):
    """The parameters of a module, by name."""
    return Named(_made(make_module, make).named_parameters())


def module(make_module, make, values, copy, args, kwargs, with_gradients, of_parameters, earlier=()):
    """The output of a module with given weights; with gradients, those of its inputs, and of its parameters, by name.

    earlier: arguments with which the same module is called once before.
    """
    built = _made(make_module, make)
    floats = [a.dtype for a in args if hasattr(a, "is_floating_point") and a.is_floating_point()]
    built.to(floats[0] if floats else next(iter(values.values())).dtype)
    copy(built, values)
    given = [_tracked(a) if with_gradients else a for a in args]
    if earlier:
        built(*earlier)
    result = built(*given, **kwargs)
    if isinstance(result, Named):  # an exercise's own module, which names its parts
        return result
    parts = result if isinstance(result, tuple) else (result,)
    out = Named({f"output {i}" if len(parts) > 1 else "output": part for i, part in enumerate(parts)})
    if with_gradients:
        pull(parts[0])
        out.update(
            {f"gradient of input {i}": a.grad for i, a in enumerate(given) if getattr(a, "requires_grad", False)}
        )
        if of_parameters:
            out.update({f"gradient of {name}": p.grad for name, p in built.named_parameters()})
    return out


def work(make_module, make, values, copy, args):
    """The floating-point operations of a module's forward: of its matrix products, as torch counts them, and of other
    products, which may stand for one: two for each number that is made."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    class Products(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, function, types, given=(), options=None):
            result = function(*given, **(options or {}))
            if function.__name__.split(".")[0] in ("mul", "mul_", "div", "div_", "addcmul", "addcmul_"):
                self.made += result.numel()
            return result

    # A CPU's fused kernel is not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, Products() as products:
        _made(make_module, make)
        products.made *= -1  # weights are scaled when they are drawn: that is no part of the forward
        module(make_module, make, values, copy, args, {}, False, False)
    return Named(operations=counter.get_total_flops() + 2 * products.made)


def by_name(built, values):
    """Put values into the parameters of the same names."""
    for name, parameter in built.named_parameters():
        parameter.data.copy_(values[name])


def step(function, model, batches, optimizer):
    """What a training step returns for each batch, and the weights after it."""
    optimizer, out = optimizer(model.parameters()), Named()
    for i, batch in enumerate(batches, 1):
        result = function(model, optimizer, *batch)
        out[f"what step {i} returns"] = result
        out.update({f"{name} after step {i}": p.detach().clone() for name, p in model.named_parameters()})
    return out


def pull(result):
    """Differentiate a weighted sum of a result: each entry counts differently."""
    import torch

    if getattr(result, "requires_grad", False):
        weights = torch.cos(torch.arange(result.numel(), dtype=torch.float64)).reshape(result.shape)
        (result * weights.to(result.dtype) if result.ndim else result).sum().backward()


def _made(make_module, make):
    import torch

    torch.manual_seed(0)
    built = make_module(**make)
    if not isinstance(built, torch.nn.Module):
        raise TypeError(f"a torch.nn.Module is expected, {type(built).__name__} was made")
    return built


def _tracked(a):
    if hasattr(a, "is_floating_point") and a.is_floating_point():
        return a.detach().clone().requires_grad_()
    return a
