// The pipeline of vimdeploy/preprocess.py, to the bit.
//
// Scaling is Pillow's antialiased bicubic: Keys' kernel with a = -1/2, widened by the factor an axis shrinks by;
// weights in 22-bit fixed point; rows first, then columns, rounded to 8 bits after each. Only the pixels that the
// centre crop keeps are computed: each depends on the source alone.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "image.h"
#include "refuse.h"

namespace vimdeploy {
namespace {

// 8 bits of pixel and up to 2 of overshoot leave 22 of 32 for the weight.
constexpr int kWeightBits = 32 - 8 - 2;
constexpr double kRadius = 2;  // of Keys' kernel

double Keys(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

// The source pixels that make one pixel of the result, and their weights.
struct Taps {
  int first;
  std::vector<std::int32_t> weights;
};

// Taps for results from .. from + count - 1 of an axis scaled from `source` pixels to `target`.
std::vector<Taps> TapsOf(int source, int target, int from, int count) {
  const double scale = static_cast<double>(source) / target;
  const double widened = std::max(scale, 1.0);
  const double radius = kRadius * widened;
  std::vector<Taps> result(static_cast<std::size_t>(count));
  for (int i = 0; i < count; ++i) {
    const double center = (from + i + 0.5) * scale;
    const int first = std::max(static_cast<int>(center - radius + 0.5), 0);
    const int last = std::min(static_cast<int>(center + radius + 0.5), source);
    std::vector<double> weights;
    double sum = 0;
    for (int x = first; x < last; ++x) {
      weights.push_back(Keys((x - center + 0.5) * (1 / widened)));
      sum += weights.back();
    }
    Taps& taps = result[static_cast<std::size_t>(i)];
    taps.first = first;
    for (const double weight : weights) {
      const double fixed = weight / sum * (1 << kWeightBits);
      taps.weights.push_back(static_cast<std::int32_t>(fixed < 0 ? fixed - 0.5 : fixed + 0.5));
    }
  }
  return result;
}

// The weighted sum of pixels `step` bytes apart, rounded to a byte.
std::uint8_t Weigh(const std::uint8_t* pixel, std::size_t step, const std::vector<std::int32_t>& weights) {
  std::int32_t sum = 1 << (kWeightBits - 1);
  for (const std::int32_t weight : weights) {
    sum += *pixel * weight;
    pixel += step;
  }
  return static_cast<std::uint8_t>(std::clamp(sum >> kWeightBits, 0, 255));
}

struct Size {
  std::int64_t width;
  std::int64_t height;
};

// What an image is scaled to before the crop: the side that fits the frame becomes exact, the other is truncated.
Size ScaledSize(const Preprocessing& p, Size image) {
  Size frame{p.width, p.height};
  if (p.resize == 0) {
    if (image.width == p.width && image.height == p.height) return image;
  } else {
    const int shorter = std::min(p.width, p.height);
    const auto side = [&](int length) {
      return static_cast<std::int64_t>(static_cast<double>(std::int64_t{p.resize} * length) / shorter);
    };
    frame = {side(p.width), side(p.height)};
  }
  if (image.width * frame.height <= image.height * frame.width) {
    return {frame.width, static_cast<std::int64_t>(static_cast<double>(frame.width * image.height) /
                                                   static_cast<double>(image.width))};
  }
  return {
      static_cast<std::int64_t>(static_cast<double>(frame.height * image.width) / static_cast<double>(image.height)),
      frame.height};
}

// Half of an even or odd margin, a half rounded to even.
int CropStart(std::int64_t margin) {
  const std::int64_t half = margin / 2;
  return static_cast<int>(half + (margin % 2 != 0 && half % 2 != 0));
}

}  // namespace

void Preprocess(const Preprocessing& p, const Image& image, float* out) {
  if (image.width < 1 || image.height < 1 ||
      image.pixels.size() !=
          std::size_t{3} * static_cast<std::size_t>(image.width) * static_cast<std::size_t>(image.height)) {
    RefuseInput("an Image of " + std::to_string(image.width) + "x" + std::to_string(image.height) + " with " +
                    std::to_string(image.pixels.size()) + " bytes of pixels",
                "fill in width * height * 3 bytes, RGB");
  }
  const Size scaled = ScaledSize(p, {image.width, image.height});
  if (scaled.width > kMaxPixels || scaled.height > kMaxPixels || scaled.width * scaled.height > kMaxPixels) {
    RefuseInput("an image of " + std::to_string(image.width) + "x" + std::to_string(image.height) +
                    " would be scaled to " + std::to_string(scaled.width) + "x" + std::to_string(scaled.height) +
                    " pixels",
                "crop it to usual proportions first");
  }
  const int left = CropStart(scaled.width - p.width);
  const int top = CropStart(scaled.height - p.height);
  const auto columns = TapsOf(image.width, static_cast<int>(scaled.width), left, p.width);
  const auto rows = TapsOf(image.height, static_cast<int>(scaled.height), top, p.height);

  // Rows of the source that the crop sees.
  int first = image.height;
  int last = 0;
  for (const Taps& taps : rows) {
    first = std::min(first, taps.first);
    last = std::max(last, taps.first + static_cast<int>(taps.weights.size()));
  }
  const auto source_row = static_cast<std::size_t>(image.width) * 3;
  const auto row = static_cast<std::size_t>(p.width) * 3;
  const bool scale_columns = scaled.width != image.width;
  std::vector<std::uint8_t> narrowed(row * static_cast<std::size_t>(last - first));
  for (int y = first; y < last; ++y) {
    const std::uint8_t* const from = image.pixels.data() + static_cast<std::size_t>(y) * source_row;
    std::uint8_t* to = narrowed.data() + static_cast<std::size_t>(y - first) * row;
    if (!scale_columns) {
      std::copy_n(from + static_cast<std::size_t>(left) * 3, row, to);
      continue;
    }
    for (const Taps& taps : columns)
      for (std::size_t channel = 0; channel < 3; ++channel)
        *to++ = Weigh(from + static_cast<std::size_t>(taps.first) * 3 + channel, 3, taps.weights);
  }

  const bool scale_rows = scaled.height != image.height;
  const auto plane = static_cast<std::size_t>(p.width) * static_cast<std::size_t>(p.height);
  for (int y = 0; y < p.height; ++y) {
    const Taps& taps = rows[static_cast<std::size_t>(y)];
    const int source = scale_rows ? taps.first : top + y;
    const std::uint8_t* const from = narrowed.data() + static_cast<std::size_t>(source - first) * row;
    for (std::size_t i = 0; i < row; ++i) {
      const std::uint8_t pixel = scale_rows ? Weigh(from + i, row, taps.weights) : from[i];
      const std::size_t channel = i % 3;
      // In single precision and this order, as NumPy evaluates it.
      out[channel * plane + static_cast<std::size_t>(y) * static_cast<std::size_t>(p.width) + i / 3] =
          (static_cast<float>(pixel) / 255.0f - p.mean[channel]) / p.std[channel];
    }
  }
}

}  // namespace vimdeploy
