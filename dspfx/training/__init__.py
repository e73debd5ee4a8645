"""What a pruned network is trained with: fine-tuning, distillation, statistics."""
