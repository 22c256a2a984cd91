// The one list of handlers, of both modules: each operation by the name it is registered under, the problem it poses,
// and the reader of its contract.
#ifndef FEDFUSE_HANDLERS_OPERATIONS_H_
#define FEDFUSE_HANDLERS_OPERATIONS_H_

#define FEDFUSE_FOR_EACH_OPERATION(X)                                    \
  X(weighted_sum, WeightedSumProblem, read_weighted_sum)                 \
  X(weighted_mean, WeightedSumProblem, read_weighted_sum)                \
  X(weighted_spread, WeightedSpreadProblem, read_weighted_spread)        \
  X(squared_norms, ClientDotsProblem, read_squared_norms)                \
  X(client_dots, ClientDotsProblem, read_client_dots)                    \
  X(finite_clients, FiniteClientsProblem, read_finite_clients)           \
  X(accumulate_weighted, AccumulateProblem, read_accumulate)             \
  X(stack_clients, StackProblem, read_stack)                             \
  X(coordinate_median, TrimmedMeanProblem, read_trimmed_mean)            \
  X(trimmed_mean, TrimmedMeanProblem, read_trimmed_mean)                 \
  X(mean_around_median, TrimmedMeanProblem, read_mean_around_median)     \
  X(selected_mean, SelectedMeanProblem, read_selected_mean)              \
  X(spread_to_selected, SpreadProblem, read_spread)                      \
  X(client_norms, ClientNormsProblem, read_client_norms)                 \
  X(clipped_weighted_sum, PrivateSumProblem, read_private_sum)           \
  X(noisy_weighted_sum, PrivateSumProblem, read_private_sum)             \
  X(clipped_noisy_weighted_sum, PrivateSumProblem, read_private_sum)     \
  X(fedavgm_weighted_update, ServerUpdateProblem, read_server_update)    \
  X(fedadagrad_weighted_update, ServerUpdateProblem, read_server_update) \
  X(fedadam_weighted_update, ServerUpdateProblem, read_server_update)    \
  X(fedyogi_weighted_update, ServerUpdateProblem, read_server_update)    \
  X(topk_sparse_weighted_sum, SparseSumProblem, read_sparse_sum)         \
  X(sparse_spread, SparseSpreadProblem, read_sparse_spread)              \
  X(sparse_dots, SparseDotsProblem, read_sparse_dots)                    \
  X(quantized_weighted_sum, QuantizedSumProblem, read_quantized_sum)     \
  X(quantized_dots, QuantizedDotsProblem, read_quantized_dots)           \
  X(pairwise_squared_distances, PairsProblem, read_pairs)                \
  X(mix_clients, MixProblem, read_mix)                                   \
  X(step_toward_clients, StepProblem, read_step)

#endif  // FEDFUSE_HANDLERS_OPERATIONS_H_
