//! Lists, page by page.
//!
//! Owns: following `next_page_token`. Must not know: what is listed.

use serde_json::Value;

use crate::client::Client;
use crate::error::ClientError;
use crate::request::Request;

/// Where a walk through a list is.
#[derive(Debug)]
enum At {
    Start,
    Page(String),
    End,
}

/// The pages of a list, in order. An item that is there all the time comes once, whatever comes and goes
/// beside it.
#[derive(Debug)]
pub struct Pages {
    client: Client,
    list: Request,
    at: At,
}

impl Pages {
    pub(crate) fn new(client: Client, list: Request) -> Self {
        Self { client, list, at: At::Start }
    }

    /// The items of the next page; `None` after the last. After an error the same page is asked for again.
    ///
    /// # Errors
    /// As [`Client::send`]; the answer is no page, or leads back to itself.
    pub async fn next(&mut self) -> Result<Option<Vec<Value>>, ClientError> {
        let request = match &self.at {
            At::Start => self.list.clone(),
            At::Page(token) => self.list.clone().query("page_token", token),
            At::End => return Ok(None),
        };
        let answer = self.client.send(&request).await?;
        let mut page = answer.json()?;
        // Indexing a value that is no object, to take from it, would panic.
        let mut take = |name: &str| page.get_mut(name).map_or(Value::Null, Value::take);
        let Value::Array(items) = take("items") else { return Err(answer.odd("a list without items")) };
        let next = match take("next_page_token") {
            Value::Null => At::End,
            Value::String(token) => At::Page(token),
            _ => return Err(answer.odd("next_page_token is no text")),
        };
        if let (At::Page(now), At::Page(next)) = (&self.at, &next)
            && now == next
        {
            return Err(answer.odd("a page whose next page is itself"));
        }
        self.at = next;
        Ok(Some(items))
    }

    /// The items of all pages that follow.
    ///
    /// # Errors
    /// As [`Pages::next`]; there are more than `most` items.
    pub async fn all(mut self, most: usize) -> Result<Vec<Value>, ClientError> {
        let mut all = Vec::new();
        while let Some(items) = self.next().await? {
            all.extend(items);
            if all.len() > most {
                let (endpoint, what) = (self.client.endpoint().clone(), format!("more than {most} items"));
                return Err(ClientError::Answer { endpoint, what });
            }
        }
        Ok(all)
    }
}
