"""A small Llama pruned under a budget, for the tests of budgets."""

from tiny_models import batches, llama

from zeroskip.prune import prune


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def zeros(model, report):
    return {row.name: int((model.get_submodule(row.name).weight == 0).sum()) for row in report.rows}


def run(budget, target=None, model=None, **more):
    model = llama() if model is None else model
    more = {"method": "magnitude"} | more
    report = prune(model, budget=budget, target=target, calibration=batches("llama", 2), **more)
    return model, report, zeros(model, report)
