// This file computes "fejer" in its parallel form, for one instruction set. A cell is one visit of a slot: the slot is
// in flux while it takes tokens, then it stands still until its next cell. Per sequence and kv head (a track), two
// tables hold the content of each cell as a row. Rows 0 .. slots - 1 are the slots as given; the cells of this call
// follow. A query sees slots - 2 standing cells, which are rows of the tables, and two cells in flux, whose contents
// are carried along. Rounds take few tracks at a time, so that the tables fit into the caches however long a call is.
#include "vec.h"

namespace blurry_attn::cpu::BLURRY_ISA {
namespace {

constexpr int64_t kStretch = 512;  // tokens of a work item at least
constexpr int64_t kBlock = 16;     // query rows of a block at most
constexpr int64_t kSlotsPerItem = 16;
constexpr int64_t kRoundBytes = int64_t(4) << 20;  // bytes of the tables of a round, per thread

// A Track is one sequence and kv head: it says which cells its tables hold.
struct Track {
  Sequence sequence;
  Cells cells;
  int64_t batch_entry, head;
  int64_t first_row, first_scalar;  // offsets of its rows and of its scalars in those of the round

  int64_t begin() const { return sequence.position; }
  int64_t end() const { return sequence.position + sequence.length; }
  int64_t base() const { return cells.trailing(begin()) - cells.slots; }  // the cell of row 0
  // newest() is the cell of the last row: the leading cell at the last token.
  int64_t newest() const { return sequence.length ? cells.trailing(end() - 1) + 1 : base() + cells.slots - 1; }
  int64_t rows() const { return newest() - base() + 1; }
  int64_t row(int64_t cell) const { return first_row + cell - base(); }
  // opened() says whether the slot of `cell` is open just before `token`.
  bool opened(int64_t cell, int64_t token) const { return cells.slot_opening(cells.slot(cell)) < token; }
  // block_end() is the token at which the block of query rows from `token` ends. Blocks are aligned to cells, so that
  // rows which see the same cells stay together.
  int64_t block_end(int64_t token, int64_t limit) const {
    const int64_t r = cells.resolution, period = r < 8 ? r * (8 / r) : r;
    const int64_t cell_end = (floor_div(token - cells.phase, period) + 1) * period + cells.phase;
    const int64_t end = cell_end < token + kBlock ? cell_end : token + kBlock;
    return end < limit ? end : limit;
  }
};

struct Stretch {
  int64_t track, begin, end;
};

// A Table holds contents of cells, or gradients of these, for the tracks of a round: `width` numbers per cell.
template <typename compute>
struct Table {
  compute* data = nullptr;
  int64_t width = 0;

  compute* row(const Track& track, int64_t cell) const { return data + track.row(cell) * width; }
};

template <typename storage, typename compute>
struct Window {
  const Problem<storage, compute>& problem;
  const Allocate& allocate;
  std::vector<Track> tracks;  // tracks of the round
  int64_t key_width, value_width;
  Table<compute> keys, values;

  Window(const Problem<storage, compute>& p, const Allocate& a)
      : problem(p), allocate(a), key_width(padded<compute>(p.key_dim)), value_width(padded<compute>(p.value_dim)) {
    const int64_t round_rows = p.threads * kRoundBytes / ((key_width + value_width) * sizeof(compute));
    int64_t rows = 0, scalars = 0;
    for (size_t s = 0; s < p.sequences.size(); ++s) {
      for (int64_t h = 0; h < p.kv_heads(); ++h) {
        Track track{p.sequences[s], p.cells[h], static_cast<int64_t>(s), h, rows, scalars};
        if (rounds.empty() || rows + track.rows() > round_rows) {
          rounds.emplace_back();
          rows = scalars = track.first_row = track.first_scalar = 0;
        }
        rounds.back().push_back(track);
        rows += track.rows();
        scalars += p.group() * track.sequence.length;
        most_rows = rows > most_rows ? rows : most_rows;
        most_scalars = scalars > most_scalars ? scalars : most_scalars;
      }
    }
    keys = make_table(key_width);
    values = make_table(value_width);
  }

  Table<compute> make_table(int64_t width) const { return {static_cast<compute*>(allocate(most_rows * width)), width}; }
  // make_scalars() allocates `count` numbers per token and query head.
  compute* make_scalars(int64_t count) const { return static_cast<compute*>(allocate(most_scalars * count)); }

  template <typename body_type>
  void for_rounds(const body_type& body) {
    for (const std::vector<Track>& round : rounds) {
      tracks = round;
      fill_cells();
      body();
    }
  }

  std::vector<Stretch> stretches(bool span_the_window) const {
    std::vector<Stretch> items;
    for (size_t i = 0; i < tracks.size(); ++i) {
      const Track& track = tracks[i];
      const int64_t reach = span_the_window ? track.cells.window() : 8 * track.cells.resolution;
      const int64_t length = reach > kStretch ? reach : kStretch;
      for (int64_t t = track.begin(); t < track.end(); t += length) {
        items.push_back({static_cast<int64_t>(i), t, t + length < track.end() ? t + length : track.end()});
      }
    }
    return items;
  }

  const compute* gates(const Track& track) const { return problem.gates[track.head]->data(); }
  // at() is the row of a tensor's view at a token of the track.
  template <typename any>
  any* at(const View<any>& view, const Track& track, int64_t head, int64_t token) const {
    return view.row(track.sequence.batch, head, track.sequence.begin + token - track.begin());
  }
  const compute* read_key(const Track& track, int64_t token, compute* scratch) const {
    return read_row(at(problem.key, track, track.head, token), problem.key.element, problem.key_dim, scratch);
  }
  const compute* read_value(const Track& track, int64_t token, compute* scratch) const {
    return read_row(at(problem.value, track, track.head, token), problem.value.element, problem.value_dim, scratch);
  }
  // load_query() reads a query and multiplies it by the scale.
  void load_query(const Track& track, int64_t head, int64_t token, compute* to) const {
    load_row(at(problem.query, track, head, token), problem.query.element, problem.key_dim, to, problem.scale);
  }
  // scalar_at() is the offset of a number in a contiguous (batch, query head, token) tensor.
  int64_t scalar_at(const Track& track, int64_t head, int64_t token) const {
    return (track.sequence.batch * problem.query_heads + head) * problem.tokens + track.sequence.begin + token -
           track.begin();
  }
  // round_scalar_at() is its offset in the scalars of the round.
  int64_t round_scalar_at(const Track& track, int64_t head, int64_t token) const {
    return track.first_scalar + (head - track.head * problem.group()) * track.sequence.length + token - track.begin();
  }
  // slot_at() is the row of the slot of `cell` in a (sequence, kv head, slot, element) tensor.
  int64_t slot_at(const Track& track, int64_t cell) const {
    return (track.batch_entry * problem.kv_heads() + track.head) * track.cells.slots + track.cells.slot(cell);
  }

  // for_slots() runs body(track, first, last) over all slots, counted from the first cell of the table.
  template <typename body_type>
  void for_slots(const body_type& body) const {
    const int64_t chunks = (problem.slots() + kSlotsPerItem - 1) / kSlotsPerItem;
    problem.parallel(static_cast<int64_t>(tracks.size()) * chunks, [&](int64_t i) {
      const int64_t first = i % chunks * kSlotsPerItem;
      const int64_t last = first + kSlotsPerItem;
      body(tracks[i / chunks], first, last < problem.slots() ? last : problem.slots());
    });
  }

  // Pass 1 computes what every cell holds at the end of its flux (or of the sequence), slot by slot from cell to cell.
  void fill_cells() const {
    for_slots([this](const Track& track, int64_t first, int64_t last) { fill_slots(track, first, last); });
  }
  void fill_slots(const Track& track, int64_t first, int64_t last) const {
    const Cells& cells = track.cells;
    std::vector<compute> scratch(key_width > value_width ? key_width : value_width);
    for (int64_t cell = track.base() + first; cell < track.base() + last; ++cell) {
      if (problem.state_key && track.opened(cell, track.begin())) {
        load_row(problem.state_key + slot_at(track, cell) * problem.key_dim, 1, problem.key_dim, keys.row(track, cell));
        load_row(problem.state_value + slot_at(track, cell) * problem.value_dim, 1, problem.value_dim,
                 values.row(track, cell));
      } else {
        zero_row(keys.row(track, cell), key_width);
        zero_row(values.row(track, cell), value_width);
      }
    }
    for (int64_t lap = track.base() + cells.slots + first; lap <= track.newest(); lap += cells.slots) {
      for (int64_t cell = lap; cell < lap + last - first && cell <= track.newest(); ++cell) {
        compute* key = keys.row(track, cell);
        compute* value = values.row(track, cell);
        copy_row(keys.row(track, cell - cells.slots), key_width, key);
        copy_row(values.row(track, cell - cells.slots), value_width, value);
        const int64_t from = first_token(track, cell), to = last_token(track, cell);
        for (int64_t t = from; t <= to; ++t) {
          const compute share = cells.gate(gates(track), cell, t);
          if (share == 0) continue;
          write_row(share, read_key(track, t, scratch.data()), key, key_width, key);
          write_row(share, read_value(track, t, scratch.data()), value, value_width, value);
        }
      }
    }
  }
  // first_token() and last_token() bound the tokens of this call that find a cell in flux and its slot open.
  int64_t first_token(const Track& track, int64_t cell) const {
    int64_t from = track.cells.flux_begin(cell);
    if (track.cells.opens(cell) && track.cells.opening(cell) > from) from = track.cells.opening(cell);
    return from > track.begin() ? from : track.begin();
  }
  int64_t last_token(const Track& track, int64_t cell) const {
    const int64_t to = track.cells.flux_end(cell);
    return to < track.end() - 1 ? to : track.end() - 1;
  }

  void write_state(compute* state_key, compute* state_value) const {
    problem.parallel(static_cast<int64_t>(tracks.size()), [&](int64_t i) {
      const Track& track = tracks[i];
      for (int64_t cell = track.newest() - track.cells.slots + 1; cell <= track.newest(); ++cell) {
        // The row of a slot that is still shut is zero, and so is its state.
        store_row(keys.row(track, cell), problem.key_dim, state_key + slot_at(track, cell) * problem.key_dim, 1);
        store_row(values.row(track, cell), problem.value_dim, state_value + slot_at(track, cell) * problem.value_dim,
                  1);
      }
    });
  }

 private:
  std::vector<std::vector<Track>> rounds;
  int64_t most_rows = 0, most_scalars = 0;
};

// A StretchView holds what the query rows of one stretch (a work item) see. Standing cells have transposed copies for
// products over head_dim; contents in flux stand after each token of the current block of rows.
template <typename storage, typename compute>
struct StretchView {
  const Window<storage, compute>& window;
  const Track& track;
  const Cells& cells;
  const compute* gates;
  int64_t first_cell, columns, row_width;  // the standing cells are first_cell .. first_cell + columns - 1
  std::vector<compute> keys_t, values_t;   // [dim][row_width]
  std::vector<compute> flux_keys, flux_values, scratch;
  int64_t trailing;  // the trailing cell of the last token

  StretchView(const Window<storage, compute>& w, const Stretch& stretch, bool with_values)
      : window(w), track(w.tracks[stretch.track]), cells(track.cells), gates(w.gates(track)) {
    first_cell = first_standing(cells.trailing(stretch.begin));
    columns = cells.trailing(stretch.end - 1) - first_cell;
    if (columns < 0) columns = 0;
    // A row has room for the two cells in flux after the standing ones and for a last load past the end. Its number of
    // vectors is odd, since rows a power of two apart would share cache sets.
    const int64_t vectors = padded<compute>(columns + 2) / kLanes<compute>;
    row_width = (vectors + (vectors % 2 ? 2 : 1)) * kLanes<compute>;
    transpose(w.keys, w.problem.key_dim, keys_t);
    if (with_values) transpose(w.values, w.problem.value_dim, values_t);
    flux_keys.resize((kBlock + 1) * 2 * w.key_width);
    flux_values.resize((kBlock + 1) * 2 * w.value_width);
    scratch.resize(w.key_width + w.value_width);
    start(stretch.begin);
  }

  int64_t first_standing(int64_t trailing_cell) const {
    const int64_t cell = trailing_cell - cells.slots + 2;
    return cell > cells.first() ? cell : cells.first();
  }

  void transpose(const Table<compute>& table, int64_t dim, std::vector<compute>& to) const {
    to.assign(dim * row_width, 0);
    for (int64_t c = 0; c < columns; ++c) {
      const compute* row = table.row(track, first_cell + c);
      for (int64_t d = 0; d < dim; ++d) to[d * row_width + c] = row[d];
    }
  }

  // flux_key() and flux_value() are contents after the block's row `row` (-1: before the block), of the trailing cell
  // (which = 0) or the leading one (1).
  compute* flux_key(int64_t row, int which) { return flux_keys.data() + ((row + 1) * 2 + which) * window.key_width; }
  compute* flux_value(int64_t row, int which) {
    return flux_values.data() + ((row + 1) * 2 + which) * window.value_width;
  }

  // start() carries the contents in flux from the beginning of the two cells' flux to just before token t.
  void start(int64_t t) {
    trailing = cells.trailing(t);
    for (int which = 0; which < 2; ++which) {
      const int64_t cell = trailing + which;
      copy_row(window.keys.row(track, cell - cells.slots), window.key_width, flux_key(-1, which));
      copy_row(window.values.row(track, cell - cells.slots), window.value_width, flux_value(-1, which));
      for (int64_t s = window.first_token(track, cell); s < t; ++s) {
        const compute share = cells.gate(gates, cell, s);
        write_row(share, window.read_key(track, s, scratch.data()), flux_key(-1, which), window.key_width,
                  flux_key(-1, which));
        write_row(share, window.read_value(track, s, scratch.data()), flux_value(-1, which), window.value_width,
                  flux_value(-1, which));
      }
    }
  }
  // advance() fills the contents in flux after each of the tokens t0 .. t1 - 1. The block before ended at t0.
  void advance(int64_t t0, int64_t t1, int64_t rows_before) {
    if (rows_before) {
      copy_row(flux_key(rows_before - 1, 0), 2 * window.key_width, flux_key(-1, 0));
      copy_row(flux_value(rows_before - 1, 0), 2 * window.value_width, flux_value(-1, 0));
    }
    for (int64_t t = t0; t < t1; ++t) {
      const compute* key = window.read_key(track, t, scratch.data());
      const compute* value = window.read_value(track, t, scratch.data() + window.key_width);
      const bool turns = t == cells.flux_end(trailing) + 1;  // the leading cell becomes the trailing one
      if (turns) ++trailing;
      for (int which = 0; which < 2; ++which) {
        const int64_t cell = trailing + which, row = t - t0;
        const compute* key_before = flux_key(row - 1, which);
        const compute* value_before = flux_value(row - 1, which);
        if (turns && which == 0) {
          key_before = flux_key(row - 1, 1);
          value_before = flux_value(row - 1, 1);
        } else if (turns) {
          key_before = window.keys.row(track, cell - cells.slots);
          value_before = window.values.row(track, cell - cells.slots);
        }
        const compute share = cells.is_open(cell, t) ? cells.gate(gates, cell, t) : compute(0);
        write_row(share, key, key_before, window.key_width, flux_key(row, which));
        write_row(share, value, value_before, window.value_width, flux_value(row, which));
      }
    }
  }
};

// Columns are the standing cells of a block of rows t0 .. t1 - 1, as columns of the stretch. Row i sees low[i] ..
// high[i] - 1, and all rows see common .. common_end - 1. Products over cells keep to these ranges, since a weight of
// zero would not keep a NaN out. The scores of the cells in flux follow: the trailing cell has high[i], and the
// leading one high[i] + 1 where it is open.
template <typename storage, typename compute>
struct Columns {
  StretchView<storage, compute>& view;
  int64_t rows, common, common_end;
  int64_t low[kBlock], high[kBlock];
  bool leads[kBlock];

  Columns(StretchView<storage, compute>& v, int64_t t0, int64_t t1) : view(v), rows(t1 - t0) {
    int64_t cell = view.cells.trailing(t0);
    for (int64_t i = 0; i < rows; ++i) {
      if (t0 + i > view.cells.flux_end(cell)) ++cell;
      low[i] = view.first_standing(cell) - view.first_cell;
      high[i] = cell - view.first_cell;
      if (high[i] < low[i]) high[i] = low[i];
      leads[i] = view.cells.is_open(cell + 1, t0 + i);
    }
    common = low[rows - 1];
    common_end = high[0];
    if (common_end < common) common = common_end = high[rows - 1];
  }
  int64_t seen(int64_t i) const { return high[i] - low[i] + (leads[i] ? 2 : 1); }
  // score() computes scores[row][column] = rows . contents. Scores of columns that a row does not see mean nothing.
  void score(const compute* left, int64_t width, int64_t dim, const std::vector<compute>& contents_t,
             compute* (StretchView<storage, compute>::*flux)(int64_t, int), compute* scores) const {
    const int64_t ld = view.row_width;
    product(rows, padded<compute>(high[rows - 1] - low[0]), dim, left, width, int64_t(1), contents_t.data() + low[0],
            ld, scores + low[0], ld, false);
    for (int64_t i = 0; i < rows; ++i) {
      for (int which = 0; which < 1 + leads[i]; ++which) {
        scores[i * ld + high[i] + which] = dot(left + i * width, (view.*flux)(i, which), width);
      }
    }
  }
  // gather() computes out[row], the sum of weights[row][column] contents[column] over what the row sees.
  void gather(const compute* weights, const Table<compute>& contents,
              compute* (StretchView<storage, compute>::*flux)(int64_t, int), compute* out) const {
    const int64_t width = contents.width, ld = view.row_width;
    const compute* standing = contents.row(view.track, view.first_cell);
    if (common_end > common) {
      product(rows, width, common_end - common, weights + common, ld, int64_t(1), standing + common * width, width, out,
              width, false);
    } else {
      zero_row(out, rows * width);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const compute* w = weights + i * ld;
      compute* to = out + i * width;
      for (int64_t c = low[i]; c < high[i]; ++c) {
        if (c == common) c = common_end;
        if (c < high[i]) add_scaled(w[c], standing + c * width, width, to);
      }
      for (int which = 0; which < 1 + leads[i]; ++which) {
        add_scaled(w[high[i] + which], (view.*flux)(i, which), width, to);
      }
    }
  }
  // scatter() adds to gradients[column] the sum of weights[row][column] right[row] over the rows that see the column.
  void scatter(const compute* weights, const compute* right, const Table<compute>& gradients) const {
    const int64_t width = gradients.width, ld = view.row_width;
    compute* standing = gradients.row(view.track, view.first_cell);
    if (common_end > common) {
      product(common_end - common, width, rows, weights + common, int64_t(1), ld, right, width,
              standing + common * width, width, true);
    }
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t c = low[i]; c < high[i]; ++c) {
        if (c == common) c = common_end;
        if (c < high[i]) add_scaled(weights[i * ld + c], right + i * width, width, standing + c * width);
      }
    }
  }
};

template <typename storage, typename compute>
void attend(const Window<storage, compute>& window, const Stretch& stretch, const Outputs<storage, compute>& outputs) {
  using View = StretchView<storage, compute>;
  const Problem<storage, compute>& problem = window.problem;
  View view(window, stretch, false);
  const int64_t kw = window.key_width, vw = window.value_width, ld = view.row_width;
  std::vector<compute> query(kBlock * kw), out(kBlock * vw), scores(kBlock * ld);
  int64_t rows_before = 0;
  for (int64_t t0 = stretch.begin; t0 < stretch.end;) {
    const int64_t t1 = view.track.block_end(t0, stretch.end);
    const Columns<storage, compute> columns(view, t0, t1);
    view.advance(t0, t1, rows_before);
    for (int64_t head = view.track.head * problem.group(), end = head + problem.group(); head < end; ++head) {
      for (int64_t t = t0; t < t1; ++t) window.load_query(view.track, head, t, query.data() + (t - t0) * kw);
      columns.score(query.data(), kw, problem.key_dim, view.keys_t, &View::flux_key, scores.data());
      for (int64_t i = 0; i < columns.rows; ++i) {
        compute* seen = scores.data() + i * ld + columns.low[i];
        const int64_t count = columns.seen(i);
        const compute top = largest(seen, count, seen[count - 1]);
        const compute total = exponentials(seen, count, top), inverse = 1 / total;
        for (int64_t c = 0; c < count; ++c) seen[c] *= inverse;
        outputs.lse[window.scalar_at(view.track, head, t0 + i)] = top + std::log(total);
      }
      columns.gather(scores.data(), window.values, &View::flux_value, out.data());
      for (int64_t t = t0; t < t1; ++t) {
        store_row(out.data() + (t - t0) * vw, problem.value_dim, window.at(outputs.out, view.track, head, t),
                  outputs.out.element);
      }
    }
    rows_before = t1 - t0;
    t0 = t1;
  }
}

template <typename storage, typename compute>
void forward(const Problem<storage, compute>& problem, const Outputs<storage, compute>& outputs,
             const Allocate& allocate) {
  Window<storage, compute> window(problem, allocate);
  window.for_rounds([&] {
    const std::vector<Stretch> items = window.stretches(false);
    problem.parallel(static_cast<int64_t>(items.size()), [&](int64_t i) { attend(window, items[i], outputs); });
    if (outputs.state_key) window.write_state(outputs.state_key, outputs.state_value);
  });
}

// Flux holds what each query row gives to the two cells in flux, [scalar of the round][2 cells]. The scaled gradient of
// the logit, times the query, is a gradient of the key; the probability, times grad_out, one of the value.
template <typename compute>
struct Flux {
  compute* logit;
  compute* probability;
};

// Pass 2 of the backward computes the gradients of queries and of standing contents, and fills Flux.
template <typename storage, typename compute>
void attend_backward(const Window<storage, compute>& window, const Stretch& stretch,
                     const Gradients<storage, compute>& gradients, const Flux<compute>& flux,
                     const Table<compute>& grad_keys, const Table<compute>& grad_values) {
  using View = StretchView<storage, compute>;
  const Problem<storage, compute>& problem = window.problem;
  View view(window, stretch, true);
  const int64_t kw = window.key_width, vw = window.value_width, ld = view.row_width;
  std::vector<compute> query(kBlock * kw), grad_query(kBlock * kw), grad_out(kBlock * vw);
  std::vector<compute> scores(kBlock * ld), grad_scores(kBlock * ld);
  int64_t rows_before = 0;
  for (int64_t t0 = stretch.begin; t0 < stretch.end;) {
    const int64_t t1 = view.track.block_end(t0, stretch.end);
    const Columns<storage, compute> columns(view, t0, t1);
    view.advance(t0, t1, rows_before);
    for (int64_t head = view.track.head * problem.group(), end = head + problem.group(); head < end; ++head) {
      for (int64_t t = t0; t < t1; ++t) {
        window.load_query(view.track, head, t, query.data() + (t - t0) * kw);
        load_row(window.at(gradients.grad_out, view.track, head, t), gradients.grad_out.element, problem.value_dim,
                 grad_out.data() + (t - t0) * vw);
      }
      columns.score(query.data(), kw, problem.key_dim, view.keys_t, &View::flux_key, scores.data());
      columns.score(grad_out.data(), vw, problem.value_dim, view.values_t, &View::flux_value, grad_scores.data());
      for (int64_t i = 0; i < columns.rows; ++i) {
        const int64_t at = window.scalar_at(view.track, head, t0 + i), count = columns.seen(i);
        compute* p = scores.data() + i * ld + columns.low[i];
        compute* dz = grad_scores.data() + i * ld + columns.low[i];
        const compute total = exponentials(p, count, gradients.lse[at]);
        softmax_backward(p, count, total, gradients.grad_lse ? gradients.grad_lse[at] : compute(0), dz);
        const int64_t standing = columns.high[i] - columns.low[i];
        const int64_t in_flux = 2 * window.round_scalar_at(view.track, head, t0 + i);
        for (int which = 0; which < 2; ++which) {
          const bool seen = standing + which < count;
          flux.logit[in_flux + which] = seen ? dz[standing + which] * problem.scale : 0;
          flux.probability[in_flux + which] = seen ? p[standing + which] : 0;
        }
      }
      columns.gather(grad_scores.data(), window.keys, &View::flux_key, grad_query.data());
      columns.scatter(grad_scores.data(), query.data(), grad_keys);
      columns.scatter(scores.data(), grad_out.data(), grad_values);
      scale_row(problem.scale, columns.rows * kw, grad_query.data());
      for (int64_t t = t0; t < t1; ++t) {
        store_row(grad_query.data() + (t - t0) * kw, problem.key_dim, window.at(gradients.query, view.track, head, t),
                  gradients.query.element);
      }
    }
    rows_before = t1 - t0;
    t0 = t1;
  }
}

// An Adjoint is the gradient of one cell's content, carried backwards through the cell's flux.
template <typename storage, typename compute>
struct Adjoint {
  const Window<storage, compute>& window;
  const Track& track;
  const Gradients<storage, compute>& gradients;
  const Flux<compute>& flux;
  std::vector<compute> key, value, row;

  Adjoint(const Window<storage, compute>& w, const Track& l, const Gradients<storage, compute>& g,
          const Flux<compute>& f)
      : window(w),
        track(l),
        gradients(g),
        flux(f),
        key(w.key_width),
        value(w.value_width),
        row(w.key_width > w.value_width ? w.key_width : w.value_width) {}

  void begin(int64_t cell, const Table<compute>& grad_keys, const Table<compute>& grad_values) {
    copy_row(grad_keys.row(track, cell), window.key_width, key.data());
    copy_row(grad_values.row(track, cell), window.value_width, value.data());
  }
  // see() adds the gradients from the queries of token t, which see the cell.
  void see(int64_t cell, int64_t t) {
    const int which = cell == track.cells.trailing(t) ? 0 : 1;
    const Problem<storage, compute>& problem = window.problem;
    for (int64_t head = track.head * problem.group(), end = head + problem.group(); head < end; ++head) {
      const int64_t at = 2 * window.round_scalar_at(track, head, t) + which;
      add_scaled(flux.logit[at],
                 read_row(window.at(problem.query, track, head, t), problem.query.element, problem.key_dim, row.data()),
                 window.key_width, key.data());
      add_scaled(flux.probability[at],
                 read_row(window.at(gradients.grad_out, track, head, t), gradients.grad_out.element, problem.value_dim,
                          row.data()),
                 window.value_width, value.data());
    }
  }
  compute share(int64_t cell, int64_t t) const { return track.cells.gate(window.gates(track), cell, t); }
  // keep() steps from after a token's write to before it.
  void keep(compute share) {
    keep_row(share, window.key_width, key.data());
    keep_row(share, window.value_width, value.data());
  }
};

// Pass 3 is the echo: each cell passes a part of its gradient to the slot's previous cell, from the last to the given.
template <typename storage, typename compute>
void echo(const Window<storage, compute>& window, const Track& track, int64_t first, int64_t last,
          const Gradients<storage, compute>& gradients, const Flux<compute>& flux, const Table<compute>& grad_keys,
          const Table<compute>& grad_values) {
  const Problem<storage, compute>& problem = window.problem;
  const int64_t slots = track.cells.slots;
  Adjoint<storage, compute> adjoint(window, track, gradients, flux);
  for (int64_t start = track.base() + first; start < track.base() + last; ++start) {
    int64_t cell = start + (track.newest() - start) / slots * slots;
    if (track.opened(cell, track.end()) && gradients.grad_state_key) {
      load_row(gradients.grad_state_key + window.slot_at(track, cell) * problem.key_dim, 1, problem.key_dim,
               adjoint.row.data());
      add_scaled(compute(1), adjoint.row.data(), window.key_width, grad_keys.row(track, cell));
    }
    if (track.opened(cell, track.end()) && gradients.grad_state_value) {
      load_row(gradients.grad_state_value + window.slot_at(track, cell) * problem.value_dim, 1, problem.value_dim,
               adjoint.row.data());
      add_scaled(compute(1), adjoint.row.data(), window.value_width, grad_values.row(track, cell));
    }
    for (; cell != start; cell -= slots) {
      adjoint.begin(cell, grad_keys, grad_values);
      for (int64_t t = window.last_token(track, cell), from = window.first_token(track, cell); t >= from; --t) {
        adjoint.see(cell, t);
        adjoint.keep(adjoint.share(cell, t));
      }
      add_scaled(compute(1), adjoint.key.data(), window.key_width, grad_keys.row(track, cell - slots));
      add_scaled(compute(1), adjoint.value.data(), window.value_width, grad_values.row(track, cell - slots));
    }
    if (gradients.state_key) {
      // A shut slot was not read, so its gradient is zero.
      const bool given = track.opened(start, track.begin());
      if (!given) zero_row(grad_keys.row(track, start), window.key_width);
      if (!given) zero_row(grad_values.row(track, start), window.value_width);
      store_row(grad_keys.row(track, start), problem.key_dim,
                gradients.state_key + window.slot_at(track, start) * problem.key_dim, 1);
      store_row(grad_values.row(track, start), problem.value_dim,
                gradients.state_value + window.slot_at(track, start) * problem.value_dim, 1);
    }
  }
}

// Pass 4 computes the gradients of the tokens, from the adjoints of the two cells that each token was written to.
template <typename storage, typename compute>
void tokens_backward(const Window<storage, compute>& window, const Stretch& stretch,
                     const Gradients<storage, compute>& gradients, const Flux<compute>& flux,
                     const Table<compute>& grad_keys, const Table<compute>& grad_values) {
  const Track& track = window.tracks[stretch.track];
  const Cells& cells = track.cells;
  Adjoint<storage, compute> a(window, track, gradients, flux), b(window, track, gradients, flux);
  Adjoint<storage, compute>*trailing = &a, *leading = &b;
  std::vector<compute> key(window.key_width), value(window.value_width);
  int64_t cell = cells.trailing(stretch.end - 1);
  // Each cell's adjoint is carried from the end of its flux back to the end of the stretch.
  for (int which = 0; which < 2; ++which) {
    Adjoint<storage, compute>& adjoint = which ? *leading : *trailing;
    adjoint.begin(cell + which, grad_keys, grad_values);
    for (int64_t t = window.last_token(track, cell + which); t >= stretch.end; --t) {
      adjoint.see(cell + which, t);
      adjoint.keep(adjoint.share(cell + which, t));
    }
  }
  for (int64_t t = stretch.end - 1; t >= stretch.begin; --t) {
    if (cells.trailing(t) != cell) {
      std::swap(trailing, leading);
      trailing->begin(--cell, grad_keys, grad_values);
    }
    zero_row(key.data(), window.key_width);
    zero_row(value.data(), window.value_width);
    for (int which = 0; which < 2; ++which) {
      Adjoint<storage, compute>& adjoint = which ? *leading : *trailing;
      if (!cells.is_open(cell + which, t)) continue;
      adjoint.see(cell + which, t);
      const compute share = adjoint.share(cell + which, t);
      if (share == 0) continue;
      add_scaled(share, adjoint.key.data(), window.key_width, key.data());
      add_scaled(share, adjoint.value.data(), window.value_width, value.data());
      adjoint.keep(share);
    }
    store_row(key.data(), window.problem.key_dim, window.at(gradients.key, track, track.head, t),
              gradients.key.element);
    store_row(value.data(), window.problem.value_dim, window.at(gradients.value, track, track.head, t),
              gradients.value.element);
  }
}

template <typename storage, typename compute>
void backward(const Problem<storage, compute>& problem, const Gradients<storage, compute>& gradients,
              const Allocate& allocate) {
  Window<storage, compute> window(problem, allocate);
  const Table<compute> grad_keys = window.make_table(window.key_width);
  const Table<compute> grad_values = window.make_table(window.value_width);
  const Flux<compute> flux{window.make_scalars(2), window.make_scalars(2)};
  window.for_rounds([&] {
    problem.parallel(static_cast<int64_t>(window.tracks.size()), [&](int64_t i) {
      const Track& track = window.tracks[i];
      zero_row(grad_keys.row(track, track.base()), track.rows() * window.key_width);
      zero_row(grad_values.row(track, track.base()), track.rows() * window.value_width);
    });
    // Stretches that span the window share cells with their neighbours alone, so every second one runs at a time.
    std::vector<Stretch> colours[2];
    for (const Stretch& s : window.stretches(true)) {
      const Track& track = window.tracks[s.track];
      const int64_t length = track.cells.window() > kStretch ? track.cells.window() : kStretch;
      colours[(s.begin - track.begin()) / length % 2].push_back(s);
    }
    for (const std::vector<Stretch>& items : colours) {
      problem.parallel(static_cast<int64_t>(items.size()),
                       [&](int64_t i) { attend_backward(window, items[i], gradients, flux, grad_keys, grad_values); });
    }
    window.for_slots([&](const Track& track, int64_t first, int64_t last) {
      echo(window, track, first, last, gradients, flux, grad_keys, grad_values);
    });
    const std::vector<Stretch> items = window.stretches(false);
    problem.parallel(static_cast<int64_t>(items.size()),
                     [&](int64_t i) { tokens_backward(window, items[i], gradients, flux, grad_keys, grad_values); });
  });
}

}  // namespace
}  // namespace blurry_attn::cpu::BLURRY_ISA
