#pragma once

using cudaStream_t = struct CUstream_st*;
