#define TWIN_FACTOR 5
#include "twin.cuh"

int quintuple(int number) { return factor_times(number); }

int launch_in_pairs() {  // clusters of two blocks
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {2, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(2);
  config.blockDim = dim3(1);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int result = 0;
  return cudaLaunchKernelEx(&config, load, &result);
}
