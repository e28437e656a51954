"""The types that a call of the model returns, for type checkers. They depend on the flags of the call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

from torch import Tensor, nn

from .memory import State
from .merges import Contribution
from .objectives import LossParts

if TYPE_CHECKING:
    from typing_extensions import Unpack

    class Reading(TypedDict, total=False):
        """The arguments that do not change what a call returns."""

        ablate_hierarchical_merge: bool
        state: State | None
        logits_to_keep: int
        readings: Tensor | float | None

    class TypedModule(nn.Module):
        """A module whose calls have the arguments of `HierarchicalTransformer.forward`."""

        @overload
        def __call__(
            self,
            ids: Tensor,
            return_loss: Literal[False] = False,
            *,
            return_state: Literal[False] = False,
            **reading: Unpack[Reading],
        ) -> Tensor: ...
        @overload
        def __call__(
            self,
            ids: Tensor,
            return_loss: Literal[False] = False,
            *,
            return_state: Literal[True],
            **reading: Unpack[Reading],
        ) -> tuple[Tensor, State]: ...
        @overload
        def __call__(
            self,
            ids: Tensor,
            return_loss: Literal[True],
            *,
            return_state: Literal[False] = False,
            labels: Tensor | None = None,
            counts: Tensor | None = None,
            **reading: Unpack[Reading],
        ) -> tuple[Tensor, LossParts]: ...
        @overload
        def __call__(
            self,
            ids: Tensor,
            return_loss: Literal[True],
            *,
            return_state: Literal[True],
            labels: Tensor | None = None,
            counts: Tensor | None = None,
            **reading: Unpack[Reading],
        ) -> tuple[Tensor, LossParts, State]: ...
        @overload
        def __call__(
            self,
            ids: Tensor,
            *,
            return_hierarchical_token_embeds: Literal[True],
            return_state: Literal[False] = False,
            **reading: Unpack[Reading],
        ) -> list[Tensor]: ...
        @overload
        def __call__(
            self,
            ids: Tensor,
            *,
            return_hierarchical_token_embeds: Literal[True],
            return_state: Literal[True],
            **reading: Unpack[Reading],
        ) -> tuple[list[Tensor], State]: ...
        @overload
        def __call__(
            self,
            ids: Tensor,
            *,
            return_hierarchical_embeds: Literal[True],
            return_state: Literal[False] = False,
            **reading: Unpack[Reading],
        ) -> list[Tensor]: ...
        @overload
        def __call__(
            self,
            ids: Tensor,
            *,
            return_hierarchical_embeds: Literal[True],
            return_state: Literal[True],
            **reading: Unpack[Reading],
        ) -> tuple[list[Tensor], State]: ...
        @overload
        def __call__(
            self,
            ids: Tensor,
            *,
            return_logits_and_embeds: Literal[True],
            return_state: Literal[False] = False,
            **reading: Unpack[Reading],
        ) -> tuple[Tensor, list[Tensor]]: ...
        @overload
        def __call__(
            self,
            ids: Tensor,
            *,
            return_logits_and_embeds: Literal[True],
            return_state: Literal[True],
            **reading: Unpack[Reading],
        ) -> tuple[Tensor, list[Tensor], State]: ...
        @overload
        def __call__(
            self,
            ids: Tensor,
            *,
            return_quantized_ids: Literal[True],
            return_state: Literal[False] = False,
            **reading: Unpack[Reading],
        ) -> list[Tensor | None]: ...
        @overload
        def __call__(
            self,
            ids: Tensor,
            *,
            return_quantized_ids: Literal[True],
            return_state: Literal[True],
            **reading: Unpack[Reading],
        ) -> tuple[list[Tensor | None], State]: ...
        @overload
        def __call__(
            self,
            ids: Tensor,
            *,
            return_contributions: Literal[True],
            return_state: Literal[False] = False,
            **reading: Unpack[Reading],
        ) -> tuple[Tensor, list[Contribution]]: ...
        @overload
        def __call__(
            self,
            ids: Tensor,
            *,
            return_contributions: Literal[True],
            return_state: Literal[True],
            **reading: Unpack[Reading],
        ) -> tuple[Tensor, list[Contribution], State]: ...
        @overload
        def __call__(
            self,
            ids: Tensor,
            return_loss: bool = False,
            return_hierarchical_token_embeds: bool = False,
            return_hierarchical_embeds: bool = False,
            return_logits_and_embeds: bool = False,
            ablate_hierarchical_merge: bool = False,
            *,
            return_quantized_ids: bool = False,
            return_contributions: bool = False,
            labels: Tensor | None = None,
            counts: Tensor | None = None,
            state: State | None = None,
            return_state: bool = False,
            logits_to_keep: int = 0,
            readings: Tensor | float | None = None,
            return_read: bool = False,
        ) -> Any: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

else:
    TypedModule = nn.Module
