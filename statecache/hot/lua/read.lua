-- Reads the logs behind the watermarks for a flusher.
--
-- KEYS   the meta and the log of each partition, in pairs
-- ARGV 1 entries at most, over all partitions
--      2 bytes at most, over all partitions (one entry is always given)
--      3 identity that a recovery's fence met: only that recovery may read; '' = the partition must be ready; * = a dry run
--      4... the watermark of each partition, as SQL has it
--
-- Reply  one string. For each partition a line, then its entries:
--   OK n last_id        n lines `<id>\31<text>` follow; a record that is not ours has the text `?`
--   EPOCH | RECOVERING | IDENTITY   not admitted; nothing follows
-- Cost   5 us an entry: 0.4 are XRANGE, the rest is making its reply a table and that a text. What is fetched beyond the
--        bytes is a page of entries of a size that was not to be expected, at worst.
--@include identity
--@include ids
--@include ready_or_fenced
--@include pages
local count, bytes, fenced, here = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3], identity()
local lines, page_size, seen, left = {}, PAGE_FIRST, 0, bytes
for p = 1, #KEYS / 2 do
  local meta, log, cursor = KEYS[2 * p - 1], KEYS[2 * p], ARGV[3 + p]
  local code = refusal(meta, here, fenced)
  if code then
    lines[#lines + 1] = code
  else
    local header, found = #lines + 1, 0
    lines[header] = ''
    while count > 0 and left > 0 do
      local asked = math.min(count, page_size)
      local page = redis.call('XRANGE', log, '(' .. cursor, '+', 'COUNT', asked)
      for n = 1, #page do
        local id, fields = page[n][1], page[n][2]
        local text = (#fields == 2 and fields[1] == 'e' and not string.find(fields[2], '\n', 1, true)) and fields[2] or '?'
        lines[#lines + 1] = id .. '\31' .. text
        cursor, found, count, seen, left = id, found + 1, count - 1, seen + 1, left - #fields[2]
        if left <= 0 then break end
      end
      if #page < asked then break end
      page_size = next_page(page_size, seen, bytes - left, left)
    end
    lines[header] = 'OK ' .. found .. ' ' .. last_id(log)
  end
end
return table.concat(lines, '\n')
