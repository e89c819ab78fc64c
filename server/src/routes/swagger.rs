//! The files of Swagger UI, from the archive that the build carries.
//!
//! Owns: which of them there are, their types, unpacking one, and the script that starts the page. Must not
//! know: routes. A file is unpacked when it is asked for: the page is read rarely, and lies in no memory.

use miniz_oxide::inflate::decompress_to_vec_with_limit;
use rawzip::{CompressionMethod, ZipArchive};
use utoipa_swagger_ui_vendored::SWAGGER_UI_VENDORED;

/// The page's files that come as they are, with their types.
const FILES: [(&str, &str); 7] = [
    ("index.html", "text/html; charset=utf-8"),
    ("index.css", "text/css; charset=utf-8"),
    ("swagger-ui.css", "text/css; charset=utf-8"),
    ("swagger-ui-bundle.js", "text/javascript; charset=utf-8"),
    ("swagger-ui-standalone-preset.js", "text/javascript; charset=utf-8"),
    ("favicon-16x16.png", "image/png"),
    ("favicon-32x32.png", "image/png"),
];
/// The page's own script.
const START: (&str, &str) = ("swagger-initializer.js", "text/javascript; charset=utf-8");
/// What the page is called, in its tab and in bookmarks, and what it is called as it comes.
const TITLE: (&str, &str) = ("<title>mirrorvm API</title>", "<title>Swagger UI</title>");
/// In which order the operations of a group are shown, by how one uses them: what makes something first, what
/// removes it last. Those that are not named come between, as in the document.
const FIRST: [&str; 11] = [
    "guest_create",
    "ram_block_create",
    "guest_start",
    "guest_list",
    "guest_get",
    "migration_check_create",
    "migration_create",
    "mirror_create",
    "peer_host_create",
    "peer_host_capabilities_get",
    "helper_image_create",
];
const LAST: [&str; 10] = [
    "guest_stop",
    "guest_deletion_preview_get",
    "guest_delete",
    "guest_put",
    "migration_delete",
    "mirror_delete",
    "peer_host_delete",
    "helper_image_delete",
    "token_delete",
    "session_delete",
];
/// More than any of its files has bytes.
const LARGEST: usize = 8 << 20;

/// A file of the page.
pub(super) struct File {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Its type, as a header's value.
    pub kind: &'static str,
}

/// What is wrong with the archive, which a test rules out.
#[derive(Debug, thiserror::Error)]
pub(super) enum BadArchive {
    /// It cannot be read.
    #[error("the archive of the page cannot be read")]
    Archive(#[from] rawzip::Error),
    /// A file is not in it, or not as it says.
    #[error("the archive of the page has no good {0}")]
    File(&'static str),
}

/// The page's file of this name, which reads the document at `document`; `None`: it has none.
///
/// # Errors
/// [`BadArchive`].
pub(super) fn file(name: &str, document: &str) -> Result<Option<File>, BadArchive> {
    if name == START.0 {
        return Ok(Some(File { bytes: script(document).into_bytes(), kind: START.1 }));
    }
    let Some((name, kind)) = FILES.into_iter().find(|(known, _)| *known == name) else { return Ok(None) };
    let mut bytes = unpacked(name)?;
    if name == "index.html" {
        let html = String::from_utf8(bytes).map_err(|_| BadArchive::File(name))?;
        bytes = html.replace(TITLE.1, TITLE.0).into_bytes();
    }
    Ok(Some(File { bytes, kind }))
}

/// Makes the page show `document`. Changes by session need our header, and it disturbs nothing else. The page
/// shows an answer when it has ended, which a stream does not: what comes of it in three seconds is shown.
fn script(document: &str) -> String {
    format!(
        r##"const first = {FIRST:?};
const last = {LAST:?};
const place = (operation) => {{
  const id = operation.getIn(["operation", "operationId"]);
  const end = last.indexOf(id);
  if (end >= 0) return first.length + 1 + end;
  const begin = first.indexOf(id);
  return begin >= 0 ? begin : first.length;
}};
// Groups whose name fits, and of the others the operations whose name, path or summary does.
const filtered = (groups, phrase) => {{
  const wanted = phrase.trim().toLowerCase();
  const fits = (text) => (text || "").toLowerCase().includes(wanted);
  return groups
    .map((group, name) => fits(name) ? group : group.update("operations", (all) => all.filter((o) =>
      fits(o.get("path")) || fits(o.getIn(["operation", "operationId"])) || fits(o.getIn(["operation", "summary"])))))
    .filter((group) => group.get("operations").size > 0);
}};
const beginningOf = async (url, request) => {{
  const stop = new AbortController();
  const answer = await fetch(url, {{ ...request, signal: stop.signal }});
  const text = [];
  const reader = answer.body.getReader();
  const decoder = new TextDecoder();
  const end = setTimeout(() => stop.abort(), 3000);
  try {{
    for (let part = await reader.read(); !part.done; part = await reader.read()) {{
      text.push(decoder.decode(part.value, {{ stream: true }}));
    }}
  }} catch {{
    text.push(": the page shows three seconds of a stream\n");
  }}
  clearTimeout(end);
  return new Response(text.join(""), {{ status: answer.status, statusText: answer.statusText, headers: answer.headers }});
}};
window.onload = () => {{
  window.ui = SwaggerUIBundle({{
    url: {document:?},
    dom_id: "#swagger-ui",
    deepLinking: true,
    displayOperationId: true,
    tryItOutEnabled: true,
    validatorUrl: "none",
    filter: true,
    operationsSorter: (one, other) => place(one) - place(other),
    syntaxHighlight: false,
    requestInterceptor: (r) => {{
      r.headers["X-Mirrorvm"] = "1";
      if (new URL(r.url, location).pathname === "/v1/events/stream") r.userFetch = beginningOf;
      return r;
    }},
    presets: [SwaggerUIBundle.presets.apis, SwaggerUIStandalonePreset],
    plugins: [SwaggerUIBundle.plugins.DownloadUrl, () => ({{ fn: {{ opsFilter: filtered }} }})],
    layout: "StandaloneLayout",
  }});
}};
"##
    )
}

fn unpacked(name: &'static str) -> Result<Vec<u8>, BadArchive> {
    let archive = ZipArchive::from_slice(SWAGGER_UI_VENDORED)?;
    let mut entries = archive.entries();
    while let Some(entry) = entries.next_entry()? {
        // swagger-ui-VERSION/dist/NAME
        let mut parts = entry.file_path().as_bytes().splitn(3, |b| *b == b'/').skip(1);
        if (parts.next(), parts.next()) != (Some(&b"dist"[..]), Some(name.as_bytes())) {
            continue;
        }
        let packed = archive.get_entry(entry.wayfinder())?;
        let bytes = match entry.compression_method() {
            CompressionMethod::STORE => packed.data().to_vec(),
            CompressionMethod::DEFLATE => {
                decompress_to_vec_with_limit(packed.data(), LARGEST).map_err(|_| BadArchive::File(name))?
            }
            _ => return Err(BadArchive::File(name)),
        };
        if rawzip::crc32(&bytes) != entry.crc32() {
            return Err(BadArchive::File(name));
        }
        return Ok(bytes);
    }
    Err(BadArchive::File(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_of_the_page_is_there() {
        for (name, _) in FILES {
            let file = file(name, "/d").unwrap().unwrap();
            assert!(file.bytes.len() > 100, "{name}");
        }
        assert!(file("oauth2-redirect.html", "/d").unwrap().is_none());
    }

    #[test]
    fn the_page_asks_for_nothing_else_than_its_files() {
        let page = file("index.html", "/d").unwrap().unwrap();
        let html = String::from_utf8(page.bytes).unwrap();
        let named = html.split(['"', '\'']).filter_map(|part| part.strip_prefix("./"));
        let missing: Vec<_> = named.filter(|name| file(name, "/d").unwrap().is_none()).collect();
        assert!(missing.is_empty() && html.contains(START.0), "{missing:?}");
    }

    #[test]
    fn the_page_is_called_after_what_it_shows() {
        let html = String::from_utf8(file("index.html", "/d").unwrap().unwrap().bytes).unwrap();
        assert!(html.contains(TITLE.0) && !html.contains("<title>Swagger"), "{html}");
    }

    #[test]
    fn what_is_shown_first_or_last_is_an_operation() {
        let known: Vec<&str> = crate::access::table::OPERATIONS.iter().map(|o| o.id).collect();
        for id in FIRST.iter().chain(&LAST) {
            assert!(known.contains(id), "{id}");
        }
    }

    #[test]
    fn the_script_names_the_document_and_sends_our_header() {
        let script = String::from_utf8(file(START.0, "/v1/a.json").unwrap().unwrap().bytes).unwrap();
        assert!(script.contains(r#"url: "/v1/a.json""#), "{script}");
        assert!(script.contains(r#"r.headers["X-Mirrorvm"] = "1""#), "{script}");
    }
}
