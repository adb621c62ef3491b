#define TWIN_FACTOR 3
#include "twin.cuh"

int triple(int number) { return factor_times(number); }
