"""The hook into transformers: `from_pretrained(..., quantization_config=HfQuantConfig(...))` and reload."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils import logging

from . import attention
from .backend import load_all
from .calibrate import Calibration
from .checkpoint import (
    METHOD_KEY,
    audit,
    check_expected,
    forget_native_weights,
    point_to_native_weights,
    tensors_in,
)
from .columns import wants_producers
from .config import QUANT_METHOD, HfQuantConfig
from .coverage import Coverage, Target, survey
from .data import batches, check, kind_of, stand_in, tokenizer_for
from .errors import HfQuantError, UnsupportedError
from .experts import QExperts
from .findings import BlockFinding
from .inputs import Batch
from .native_model import from_native, to_native
from .nn import PackedModule
from .pages import release_mapped
from .parallel import plan_packed, to_local_specs
from .quantize import check_recipe, works_on_blocks
from .stats import Stats
from .swap import packed_modules, quantize_into, swap_in, swap_in_operands, swap_out

logger = logging.get_logger(__name__)


class QuantizeOnLoad(ConversionOps):
    """Quantizes one checkpoint tensor as it arrives, so that no two full-precision weights are alive at once."""

    def __init__(self, quantizer: HfQuantHfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], *, model: Any = None, missing_keys: Any = None, **kwargs: Any
    ) -> dict:
        """Full names and tensors in; the packed tensors of those that are to be quantized out."""
        out: dict[str, Tensor] = {}
        for name in list(input_dict):
            value = input_dict.pop(name)
            tensor = value[0] if isinstance(value, list) else value
            if not self.quantizer.param_needs_quantization(model, name):
                out[name] = tensor
                continue
            if missing_keys is not None:
                missing_keys.discard(name)
            try:
                out |= self.quantizer.quantize_parameter(model, name, tensor)
            except HfQuantError as error:
                return {name: _Raise(error)}
            release_mapped(tensor)
        return out

    @property
    def reverse_op(self) -> ConversionOps:
        """Nothing to undo: packed tensors are saved as they are."""
        return _Keep()


class _Raise(list):
    """Stands for a tensor that could not be made: the loader opens it as a list, outside of its error collection.

    The loader would otherwise go on to the end and raise one RuntimeError that names neither layer nor cause.
    """

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, index: Any) -> Any:
        raise self.error


class _Keep(ConversionOps):
    """Leaves tensors as they are."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict:
        return input_dict

    @property
    def reverse_op(self) -> ConversionOps:
        return self


class HfQuantHfQuantizer(HfQuantizer):
    """transformers' quantizer for `HfQuantConfig`: on-the-fly quantization, and reload of native checkpoints."""

    quantization_config: HfQuantConfig
    coverage: Coverage | None = None
    state_to_save: dict[str, Tensor] | None = None
    findings: list[BlockFinding] | None = None
    _on_blocks = False
    _batches: list[Batch] | None = None
    _tokenizer: Any = None
    _has_experts = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot work before anything is loaded; bring in every plugin, as any may have a kernel."""
        load_all()
        check_recipe(self.quantization_config.recipe)
        self._on_blocks = not self.pre_quantized and works_on_blocks(self.quantization_config.recipe)
        if self._on_blocks:
            self.quantization_config.check_data()

    def update_attn_implementation(self, config: Any) -> Any:
        """Last look at the model's config before files are resolved: native weights have a name of their own."""
        if self.pre_quantized:
            point_to_native_weights(config)
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        """Swap the modules of the meta model for packed ones."""
        config = self.quantization_config
        forget_native_weights(model.config)
        skip: Any = config.skipped if self.pre_quantized else config.modules_to_not_convert
        held = tensors_in(checkpoint_files, config.method) if self.pre_quantized and checkpoint_files else {}
        targets, self.coverage = survey(model, skip, config.embeddings, frozenset(held))
        self._has_experts = any(target.kind == "experts" for target in targets)
        self._producer_std = {} if self.pre_quantized else self._find_producers(model, checkpoint_files, targets)
        if not self.pre_quantized:
            config.skipped = {skip.name: skip.reason for skip in self.coverage.skipped if skip.eligible}
            config.source_dtype = str(dtype or model.dtype).removeprefix("torch.")
        if self._on_blocks:
            self._targets = targets
            self._prepare_data(model.config)
            return
        swap_in(model, targets, config.recipe, config, wait=not self.pre_quantized)
        swap_in_operands(model, config.attention, held=held)
        check_expected(model, held)

    def _prepare_data(self, config: Any) -> None:
        """Read the calibration data before the weights; a model that writes its own has to be there first."""
        data = self.quantization_config.data
        if data.data is None:
            return
        with torch.device("cpu"):  # the loader makes everything on meta meanwhile
            self._tokenizer = tokenizer_for(data, config.name_or_path)
            check(data, self._tokenizer, config)
            self._batches = None if kind_of(data.data) == "self" else batches(data, self._tokenizer, config)

    def _calibrate(self, model: PreTrainedModel) -> None:
        """Quantize the loaded model block by block."""
        check_in_memory(model)
        config = self.quantization_config
        if config.data.data is None:
            found = stand_in(model.config)
        else:
            found = self._batches or batches(config.data, self._tokenizer, model.config, model)
            config.describe_data(found)
        self.findings = Calibration(model, self._targets, config, found).run()

    def _find_producers(
        self, model: PreTrainedModel, checkpoint_files: Any, targets: list[Target]
    ) -> dict[str, Tensor]:
        """Spread of the weights that produce each layer's input, if the recipe asks for it."""
        if not wants_producers(self.quantization_config.recipe.columns.name):
            return {}
        from .proxy import producer_std

        return producer_std(model, checkpoint_files, [target.name for target in targets])

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Plan the packed tensors of a model that is loaded on several ranks, or raise UnsupportedError."""
        asked = getattr(model.config, "distributed_config", None)
        ranks = 1 if asked is None else max(asked.tp_size, asked.ep_size)
        if ranks == 1:
            return
        if not self.pre_quantized:
            raise UnsupportedError(
                "quantizing while loading on several ranks would give each rank ranges of its own part: quantize and "
                "save the model in one process, then load the result with tensor parallelism"
            )
        plan_packed(packed_modules(model), plan, ranks)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a full-precision parameter is to be packed: its module still waits for it."""
        module, leaf = get_module_from_name(model, param_name)
        return isinstance(module, PackedModule | QExperts) and leaf in module.waiting()

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes per element for `device_map="auto"`: placeholders take none, their packed tensors what they take."""
        return 0 if self.param_needs_quantization(model, param_name) else param.element_size()

    def get_quantize_ops(self) -> QuantizeOnLoad:
        """The operation that the loader applies to parameters that need quantization."""
        return QuantizeOnLoad(self)

    def quantize_parameter(self, model: PreTrainedModel, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Quantize the full-precision parameter `name`; returns packed parameters by full name."""
        module, leaf = get_module_from_name(model, name)
        prefix = name.removesuffix(leaf)
        stats = Stats(name.removesuffix(".weight"), self._producer_std.get(name.removesuffix(".weight")))
        packed = quantize_into(module, leaf, tensor, self.quantization_config.recipe, stats)
        self._note(prefix, leaf, module)
        return {prefix + key: torch.nn.Parameter(value, requires_grad=False) for key, value in packed.items()}

    def _note(self, prefix: str, leaf: str, module: PackedModule | QExperts) -> None:
        spec = module.spec if isinstance(module, PackedModule) else module.specs[leaf]
        owner = prefix.removesuffix(".") if isinstance(module, PackedModule) else prefix + leaf
        self.quantization_config.note(owner, spec)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Check that every weight arrived, freeze packed tensors, and make saving write a native checkpoint."""
        audit(model, self.pre_quantized)
        if self._on_blocks:
            self._calibrate(model)
        to_local_specs(packed_modules(model))
        for _, module in packed_modules(model):
            for name in module.packed_names():
                module._parameters[name].requires_grad_(False)  # type: ignore[union-attr]
        attention.freeze(model)
        # PEFT's `prepare_model_for_kbit_training` looks for a mark. Those of bitsandbytes (`is_loaded_in_4bit`) have
        # side effects: AdaLora and `num_parameters` ask for that library, IA3 does not merge, scales become float32.
        model.hqq_quantized = True
        to_native(model)
        if self.coverage is not None:
            logger.info("hfquant %s: %s", self.quantization_config.method, self.coverage.line())
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """Back to ordinary modules with the quantized values in `dtype`; what was not quantized follows."""
        loaded = model.dtype
        wanted: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or loaded
        swap_out(model, wanted)
        attention.leave(model)
        from_native(model)
        for parameter in model.parameters():
            if parameter.dtype == loaded != wanted:  # what is kept in another dtype on purpose stays
                parameter.data = parameter.data.to(wanted)
        model.hqq_quantized = False
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The tensors to save if the caller gave them; marks every weight file with the method that made it."""
        return self.state_to_save, {METHOD_KEY: self.quantization_config.method}

    def is_serializable(self) -> bool:
        """Every quantized model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top."""
        return True

    @property
    def is_compileable(self) -> bool:
        """All layers run through `torch.library` operators; experts choose at run time which of them run."""
        return not self._has_experts


if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(HfQuantConfig)
    register_quantizer(QUANT_METHOD)(HfQuantHfQuantizer)


def check_in_memory(model: nn.Module) -> None:
    """Raise UnsupportedError for a model that cannot be calibrated where it is."""
    places = {parameter.device.type for parameter in model.parameters()}
    if "meta" in places:
        raise UnsupportedError(
            "calibration while loading needs the whole model in memory, and parts of it are offloaded: use "
            "hfquant.quantize (or `hfquant quantize`), which holds one block at a time"
        )
    if places != {"cpu"}:
        raise UnsupportedError(
            f"calibration runs on the CPU, and the model is on {', '.join(sorted(places - {'cpu'}))}: load it without "
            "device_map, or use hfquant.quantize, and load the result where you want it"
        )
