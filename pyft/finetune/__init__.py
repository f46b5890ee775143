"""The fine-tuning job: data, model, training, evaluation, report, export."""
