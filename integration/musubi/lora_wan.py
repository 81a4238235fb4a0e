"""`--network_module masked_loss_triton.integration.musubi.lora_wan`: the trainer's own LoRA for WAN, and masked loss.

Options go to --network_args, for example mask_min_weight=0.05 inverted_mask_prior=true.
"""

from masked_loss_triton.integration.musubi.network_module import network_functions

create_arch_network, create_arch_network_from_weights = network_functions("wan")
